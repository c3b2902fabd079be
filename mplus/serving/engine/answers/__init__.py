"""The answers of a server: whose turn it is, how much fits into a turn, and a token of each at every step."""
