"""Sources of generated batches: copied words, questions about people, and the language of facts."""
