"""The memories of a server: whose they are and where they lie, which are open, and what is done to them."""
