"""``mplus demo`` and ``mplus demo-novel``."""
