"""The adapters and weights that a pass runs with, and what rows were made with."""
