"""The kernels themselves. These modules import triton; nothing else in mplus imports them before one is run."""
