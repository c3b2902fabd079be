"""The decoder that whole reads and writes are tried with: plain on the CPU, in float64, and on the device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from attrs import define
from torch import Tensor

import mplus
from mplus.config import JsonValue, MPlusConfig
from mplus.hf.pretrained.shipped import load_decoder
from mplus.memory import Memory
from mplus.retrievers.base import Selection
from mplus.stores.base import StoreView
from mplus.testing.rounding import InFloat64

CHUNK, ROWS = 32, 8
ALL = 64
"""More rows than any layer has here: a read retrieves all of them, so that rounding decides on none."""
MECHANISMS: Mapping[str, dict[str, JsonValue]] = {
    "mplus": {
        "chunk_tokens": CHUNK,
        "min_chunk_tokens": 4,
        "memory_tokens_per_chunk": ROWS,
        "short_term_tokens": 24,
        "retrieved_tokens": ALL,
        "long_term_tokens": ALL,
        "retriever": {"name": "linear", "width": 16, "score": "sigmoid_mean"},
        "adapters": {"rank": 2},
    },
    "kv": {
        "chunk_tokens": CHUNK,
        "retrieved_tokens": 8 * CHUNK,
        "mechanism": {"name": "kv", "retrieved_chunks": None, "min_score": 0.0},
    },
}
"""Memories, as tables of a configuration."""


@define(frozen=True)
class Decoders:
    """The same wrapped decoder three times.

    Attributes:
        plain: on the CPU, in the dtype that is tried.
        exact: in float64, with the weights of ``plain``.
        there: on the device.
    """

    plain: Any
    exact: Any
    there: Any

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, device: torch.device, **changes: JsonValue) -> Decoders:
        """Wrap the decoder that ships, on the CPU and on the device, with a memory of ``MECHANISMS``."""
        plain, there = (wrapped(name, dtype, where, **changes) for where in (torch.device("cpu"), device))
        there.load_state_dict(plain.state_dict())
        exact = copy.deepcopy(plain).double()
        if name == "mplus":  # scores are float32 whatever the decoder is in, and every row comes back
            exact.mplus.retriever.select = select_all
        return cls(plain, exact, there)

    def compute(self, what: Any) -> tuple[Any, Any, Any]:
        """Return ``what(decoder)`` of all three: plain, exact and there."""
        with torch.no_grad():
            plain = what(self.plain)
            with InFloat64():
                exact = what(self.exact)
            return plain, exact, what(self.there)


def wrapped(name: str, dtype: torch.dtype, device: torch.device, **changes: JsonValue) -> Any:
    """Return a wrapped decoder whose additions are random and matter; the same for the same arguments."""
    config = MPlusConfig.from_dict({**MECHANISMS[name], **changes})
    torch.manual_seed(0)
    model = mplus.wrap(load_decoder().to(device=device, dtype=dtype), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith("mplus.") or ".lora_" in parameter_name:
                scale = 1.0 if parameter.dim() > 2 else parameter.shape[-1] ** -0.5
                scale /= 16 if ".lora_B." in parameter_name else 1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def select_all(layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int) -> list[Selection]:
    """Select every row of each store, in place of ``Retriever.select``."""
    counts = [store.count(layer) for store in stores]
    scores = [torch.ones(count, device=queries.device) for count in counts]
    return [Selection(store.ids(layer), own) for store, own in zip(stores, scores, strict=True)]


def ids(tokens: int, seed: int, rows: int = 1) -> Tensor:
    """Draw ``[rows, tokens]`` ids on the CPU."""
    return torch.randint(4, 500, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def written(model: Any, chunks: int, rows: int = 1, **settings: Any) -> Memory:
    """Return a memory of a decoder into which so many chunks were written, from two sources."""
    memory: Memory = model.new_memory(batch_size=rows, seed=3, **settings)
    for turn, count in enumerate((chunks - chunks // 2, chunks // 2)):
        memory.write(ids(count * CHUNK, 7 + turn, rows), source=f"source {turn}", progress=False)
    return memory


def in_mode(model: Any) -> Any:
    """Return the context in which a decoder computes: float64 throughout where its weights are."""
    return InFloat64() if next(model.parameters()).dtype == torch.float64 else nullcontext()
