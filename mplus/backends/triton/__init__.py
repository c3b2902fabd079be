"""Fused kernels for NVIDIA GPUs, written in Triton. Nothing here imports triton until a kernel is run."""
