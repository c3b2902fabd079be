"""What a decoder computes of a chunk before a memory takes it in, checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mplus.memory.checks import check_finite
from mplus.memory.engine import Engine
from mplus.memory.stream import StreamState
from mplus.stores.base import StoreLayout


def encoded(
    engine: Engine, states: Sequence[StreamState], ids: Tensor, layout: StoreLayout
) -> tuple[list[Tensor], list[Tensor]]:
    """New rows of one chunk ``[B, n]`` each: per layer ``[B, k, d]``, and projected ``[B, k, w]`` where rows are.

    Raises:
        NonFiniteError: there is NaN or Inf in them.
    """
    of = f"for a chunk of {ids.shape[1]} tokens"
    blocks = engine.encode(states, ids)
    for layer, block in enumerate(blocks):
        check_finite(block, f"in layer {layer} {of}")
    projected = [engine.project(layer, block) for layer, block in enumerate(blocks)] if layout.projected_size else []
    for layer, made in enumerate(projected):
        check_finite(made, f"in keys and values of layer {layer} {of}")
    return blocks, projected


def keys(engine: Engine, layer: int, hidden: Tensor) -> Tensor | None:
    """Retriever keys of rows ``[m, d]``. Raises NonFiniteError when there is NaN or Inf in them."""
    made = engine.keys(layer, hidden)
    if made is not None:
        check_finite(made, f"in the retriever keys of layer {layer}")
    return made
