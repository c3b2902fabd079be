"""``mplus eval``: one file per command."""
