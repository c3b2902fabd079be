"""Migration: memories on disk made anew for another decoder or tokenizer, from the text that they keep."""
