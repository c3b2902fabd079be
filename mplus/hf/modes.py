"""Running a model for a moment as it is not set up to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def execution_device(module: Any) -> torch.device:
    """The device of a module's weight, or the one accelerate brings it to for a call."""
    device: torch.device = module.weight.device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def input_device(model: Any) -> torch.device:
    """Where input ids go."""
    return execution_device(model.get_input_embeddings())


@contextmanager
def with_attention(model: Any, implementation: str) -> Iterator[None]:
    """Another attention implementation, set without transformers' checks."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before
