"""Plain implementations that mplus is measured against, and the roofline."""
