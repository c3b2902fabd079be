"""Memories of text: what is recalled goes into the prompt, and calls are answered while text is generated."""
