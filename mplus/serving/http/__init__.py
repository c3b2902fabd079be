"""The front of the server: HTTP as OpenAI's clients speak it, keys, streams, limits and metrics."""
