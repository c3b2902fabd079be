"""What a memory needs of the decoder that writes it; ``mplus.hf`` provides it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mplus.config import MPlusConfig
from mplus.memory.stream import StreamState
from mplus.stores.base import StoreLayout


class Engine(Protocol):
    """A wrapped decoder, seen from its memories."""

    config: MPlusConfig
    mechanism: Any  # MemoryMechanism; typed there, because mechanisms build on memory

    @property
    def layout(self) -> StoreLayout:
        """Sizes, dtype and device of the rows this decoder makes."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in ``[0, vocab_size)``."""

    @property
    def device(self) -> torch.device:
        """Where input ids go."""

    def encode(self, states: Sequence[StreamState], ids: Tensor) -> list[Tensor]:
        """Run one write pass.

        Args:
            states: one per batch row, each with as many context rows in every layer as the others.
            ids: ``[B, n]`` int64.

        Returns:
            Per layer ``[B, k, d]``: the new rows (k is K, or fewer while there is little to encode).
        """

    def keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Retriever keys ``[m, r]`` of rows ``[m, d]``, or None when the retriever keeps none."""

    def fingerprint(self) -> dict[str, Any]:
        """Facts that a memory depends on, as plain data: decoder, adapters, additions, content-shaping config."""
