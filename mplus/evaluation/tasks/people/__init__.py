"""Invented people in splits that share nothing: names, what can be true of them, and the sentences about it."""
