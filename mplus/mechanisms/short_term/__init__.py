"""What M+ and MemoryLLM share: rows of short-term memory, which a write makes and a random few of which leave."""
