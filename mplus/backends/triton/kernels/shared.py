"""Facts about triton and the device that every launch needs."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True where kernels are interpreted on the CPU. Fixed when triton is imported, as kernels are made then."""

NUMBERS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Dtypes the kernels take, as Triton calls them."""


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: kernels start there, wherever their arguments lie."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def needs_upcast(dtype: torch.dtype) -> bool:
    """Return whether operands must be widened after loading: the interpreter computes with the bits of bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16
