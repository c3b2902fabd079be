"""The page at ``/``: a chat with a memory, in one HTML file."""
