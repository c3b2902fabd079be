"""The attention functions that mplus registers with transformers: the decoder's own, with memory as extra segments.

An attention module can also be stopped there, where its keys and values are ready (``Captured``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack, cast

import torch
from attrs import define, evolve, field
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mplus.backends.base import AttentionRequest, AttentionResult, Segment
from mplus.backends.choose import BackendChooser
from mplus.errors import NotSupported
from mplus.hf.retrofit.memory_cache import MemoryInCache
from mplus.hf.retrofit.observed import Weighted, current_observer
from mplus.hf.retrofit.placement import Placement
from mplus.hf.types import Argument
from mplus.mechanisms.decoder import Attend

logger = logging.getLogger(__name__)
BASES = ("eager", "sdpa")
"""Attention implementations of transformers that a wrapped decoder may have been loaded with."""
PREFIX = "mplus_"


CAPTURE: Literal["capture"] = "capture"
"""Passed as ``mplus_memory``: do not attend, raise ``Captured``."""


@define(eq=False)
class ModuleCall:
    """The arguments of one call of a module of the decoder: of its attention, say.

    Attributes:
        args, kwargs: as the decoder passes them.
    """

    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = field(factory=dict)

    @property
    def hidden(self) -> Tensor:
        """Return the hidden states ``[B, T, d]``: the argument of this name, else the first one."""
        hidden = self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]
        return cast("Tensor", hidden)


class Captured(Exception):
    """Carries keys and values ``[B, Hkv, P, D]`` out of an attention module.

    Where its attention function was reached, ``queries`` ``[B, H, P, D]`` and their ``scale`` (None: the usual one),
    too.
    """

    def __init__(self, keys: Tensor, values: Tensor, queries: Tensor | None = None, scale: float | None = None) -> None:
        self.keys, self.values, self.queries, self.scale = keys, values, queries, scale


class CaptureCache(Cache):
    """Raises ``Captured`` when attention hands over its keys and values."""

    layers = ()  # type: ignore[assignment]

    def __init__(self) -> None: ...

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Tensor, **kwargs: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise Captured(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


@define(frozen=True, eq=False)
class AttendedMemory:
    """Passed as ``mplus_memory``: what a layer's attention is computed with.

    Attributes:
        segments: the layer's memory, oldest first.
        chooser: picks what computes the attention.
        joined: memory and text as one, where they are kept so.
        attend: computes it in the mechanism's own way; None: what ``chooser`` picks does.
        placement: where in the text the memory stands; None: in front of all of it.
        window: of the layer, which counts the rows of a ``placement`` as tokens; None: there is none.
    """

    segments: tuple[Segment, ...]
    chooser: BackendChooser
    joined: MemoryInCache | None = None
    attend: Attend | None = None
    placement: Placement | None = None
    window: int | None = None

    def compute(self, request: AttentionRequest) -> AttentionResult:
        """Attend as usual."""
        if self.placement is not None:
            request = self.placement.applied(request, self.window)
        return self.chooser.choose(request).attend(request)


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of transformers' attention functions that a memory goes by; decoders pass others too."""

    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    s_aux: Tensor | None
    dropout: float
    position_bias: Tensor | None
    cache: Cache | None


def register() -> None:
    """Register ``mplus_eager`` and ``mplus_sdpa`` with their mask functions; harmless when done before."""
    for base in BASES:
        AttentionInterface.register(PREFIX + base, _with_memory(base))
        # Without a mask function of the same name the mask would be None: no padding, no causality.
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _with_memory(base: str) -> Callable[..., Weighted]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Argument,
        mplus_memory: AttendedMemory | Literal["capture"] | None = None,
        **kwargs: Unpack[AttentionOptions],
    ) -> Weighted:
        if isinstance(mplus_memory, str):
            # An exception is the only way out of a module that nothing is known of but that it attends.
            raise Captured(key, value, query, kwargs.get("scaling"))
        memory = mplus_memory

        def attend() -> Weighted:
            if memory is not None:
                return _attend(module, query, key, value, attention_mask, memory, base == "eager", kwargs)
            function = ALL_ATTENTION_FUNCTIONS[base] if base != "eager" else _eager(module)
            found: Weighted = function(module, query, key, value, attention_mask, *args, **kwargs)
            return found

        observer = current_observer()
        return attend() if observer is None else observer.attend(attend, query, key, value)

    return attention


@torch.compiler.disable  # it cannot follow the objects that describe a request
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    memory: AttendedMemory,
    need_weights: bool,
    kwargs: AttentionOptions,
) -> Weighted:
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        which = "position_bias" if kwargs.get("position_bias") is not None else "cache (paged attention)"
        raise NotSupported(f"{type(module).__name__} passes {which} to attention, which a memory cannot honour")
    if mask is None and query.shape[2] > 1:
        # A static cache hands over places that are not filled yet; they lie beyond the text.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if memory.placement is not None:
        memory = evolve(memory, window=kwargs.get("sliding_window"))
    scale = kwargs.get("scaling")
    request = AttentionRequest(
        queries=query,
        keys=key,
        values=value,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        segments=memory.segments,
        mask=mask,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout", 0.0),
        need_weights=need_weights,
        joined=memory.joined if memory.joined is not None and memory.joined.fits(key) else None,
    )
    result = memory.compute(request) if memory.attend is None else memory.attend(request, memory.compute)
    return result.output.transpose(1, 2).contiguous(), result.weights


def _eager(module: nn.Module) -> Callable[..., Weighted]:
    """Return the architecture's own eager attention: a function of the file that defines the attention class."""
    # A subclass of an attention module may be defined in a file without the function.
    for cls in type(module).__mro__:
        home = sys.modules.get(cls.__module__)
        function: Callable[..., Weighted] | None = getattr(home, "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotSupported(
        f"{type(module).__name__} has no eager_attention_forward; load the model with attn_implementation='sdpa'"
    )
