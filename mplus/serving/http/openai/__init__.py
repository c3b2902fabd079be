"""The routes that OpenAI's clients know: models, chat completions, completions, responses."""
