"""Memories made of text: what a write leaves is text, and what a read sees is text in front of the prompt."""
