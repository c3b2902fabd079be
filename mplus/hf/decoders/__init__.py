"""Decoders and tokenizers built for training, measurements and published checkpoints."""
