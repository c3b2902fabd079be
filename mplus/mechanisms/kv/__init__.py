"""A memory of keys and values: those of the text's own tokens, brought back by whole chunks. Nothing is trained."""
