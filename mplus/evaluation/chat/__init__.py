"""Chat models: questions through the chat template, text in the place of memory, and tables of what memory is worth."""
