"""``mplus chat``: a conversation in the terminal, with a memory."""
