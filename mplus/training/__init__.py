"""Training a decoder to use its memory: what is written and read in a step, which losses, in which order."""
