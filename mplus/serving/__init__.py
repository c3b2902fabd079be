"""Serving: one decoder, many users, a memory of its own for each; ``mplus serve``."""
