"""``mplus train`` and ``mplus train-retriever``."""
