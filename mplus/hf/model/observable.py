"""Decoders whose layers can be run under an ``AttentionObserver``, wrapped or as transformers built them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mplus.errors import NotSupported
from mplus.hf.model.modes import with_attention
from mplus.hf.retrofit.attention import BASES, PREFIX, register


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder of transformers, first to last. Raises NotSupported where there are none."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    layers = [layer for layer in layers if layer not in inner]
    if not layers:
        raise NotSupported(
            f"{type(model).__name__} has no decoder layers of transformers (GradientCheckpointingLayer), whose "
            "activations could be told apart: leave activations at 'keep'"
        )
    return cast("list[nn.Module]", layers)


@contextmanager
def observable(model: nn.Module, *, attention: bool) -> Iterator[None]:
    """Let a decoder keep no key/value cache by default and, if ``attention``, call the functions that observers see.

    Raises:
        NotSupported: its attention implementation has no such function.
    """
    config = cast("PreTrainedModel", model).config.get_text_config(decoder=True)
    implementation = str(config._attn_implementation or "eager")
    decoder = cast("PreTrainedModel", model.get_decoder() if isinstance(model, PreTrainedModel) else model)
    # Others compute attention by themselves, and go by the implementation's name in ways of their own.
    switched = attention and not implementation.startswith(PREFIX) and decoder._can_set_attn_implementation()
    if switched and implementation not in BASES:
        raise NotSupported(
            f"attn_implementation must be one of {', '.join(BASES)} for activations that are recomputed without "
            f"attention, got {implementation!r}: load the model with attn_implementation='sdpa', or use 'recompute' or "
            "'swap'"
        )
    register()
    before = config.use_cache
    with with_attention(decoder, PREFIX + implementation) if switched else nullcontext():
        try:
            config.use_cache = False
            yield
        finally:
            config.use_cache = before
