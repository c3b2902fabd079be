"""``mplus serve`` and ``mplus keys``: a server for many users, and who may use it."""
