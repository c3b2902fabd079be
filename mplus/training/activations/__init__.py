"""Activations in training: kept, recomputed, or swapped to host memory (MEMO, arXiv 2407.12117)."""
