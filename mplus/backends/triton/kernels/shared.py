"""What every launch needs to know about triton and the device."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels are interpreted on the CPU. Fixed when triton is imported, as kernels are made then."""

NUMBERS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Dtypes the kernels take, as Triton calls them."""


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current GPU, whichever holds their arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def processors(tensor: torch.Tensor) -> int:
    """How many programs the device of a tensor runs at a time, at least; 1 where the kernels are interpreted."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def needs_upcast(dtype: torch.dtype) -> bool:
    """Whether operands have to be widened after loading: the interpreter computes with the bits of bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16
