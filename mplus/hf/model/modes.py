"""Modes that a decoder is put into for a moment: eval mode, and another attention implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        try:
            model.eval()
            yield
        finally:
            _train(training)
    finally:
        _train(training)  # once more, for an interrupt may have struck the first time


def _train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


@contextmanager
def with_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Set another attention implementation for a moment, without transformers' checks."""
    config, before = model.config, model.config._attn_implementation
    try:
        try:
            config._attn_implementation = implementation
            yield
        finally:
            config._attn_implementation = before
    finally:
        config._attn_implementation = before  # as above
