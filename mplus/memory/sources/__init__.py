"""The sources that a memory was written from: list them, forget one, write the rest again."""
