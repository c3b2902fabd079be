"""A decoder whose rows are plain functions of the text and the clock, and what is done to a directory with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mplus.config import MPlusConfig
from mplus.memory import Memory
from tests.memory.counting import LAYERS, WIDTH, CountedModel, CountingEngine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from mplus.memory import StreamState

SIZES: dict[str, Any] = {
    "chunk_tokens": 8,
    "min_chunk_tokens": 1,
    "memory_tokens_per_chunk": 4,
    "short_term_tokens": 10,
    "long_term_tokens": 24,
    "retriever": {"name": "linear", "width": 2},
}

TIERS = {"name": "tiered", "device_bytes": 1500, "host_bytes": 4000}
CONFIGS: dict[str, dict[str, Any]] = {
    "mmap": {},
    "quantized-tiered": {"store": {"name": "quantized", "group": 2, "inner": TIERS}},
}
"""Of models, by the stores their directories have."""


class PlainEngine(CountingEngine):
    """Writes the same rows for the same text at the same clock, whatever was written or failed elsewhere."""

    def encode(self, states: Sequence[StreamState], ids: Tensor) -> list[Tensor]:
        (count,) = {self.mechanism.plan_write(state, ids.shape[1]).rows for state in states}
        block = torch.empty(LAYERS, len(states), count, WIDTH)
        for stream, (state, text) in enumerate(zip(states, ids, strict=True)):
            generator = torch.Generator().manual_seed(state.clock * 1000 + int(text.sum()))
            block[:, stream] = torch.randn(LAYERS, count, WIDTH, generator=generator)
        return list(block)


class PlainModel(CountedModel):
    """A decoder around a ``PlainEngine``."""

    def __init__(self, **config: Any) -> None:
        super().__init__(PlainEngine(MPlusConfig.from_dict({**SIZES, **config})))


def chunk(number: int) -> Tensor:
    """``[8]`` ids."""
    return torch.arange(number, number + 8) % 100


def reopened(path: Path, model: Any = None) -> Memory:
    """What is in the directory, read only."""
    return Memory.open(path, model or PlainModel(), read_only=True)
