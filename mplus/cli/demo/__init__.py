"""``mplus demo``, ``mplus demo --recall`` and ``mplus demo-novel``."""
