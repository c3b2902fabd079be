"""Wrapped tiny decoders with a memory that matters, next to the same decoder unwrapped, to compare with `oracle`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import mplus
from benchmarks.quality.architectures.decoders import VOCAB_SIZE, Architecture

if TYPE_CHECKING:
    from torch import Tensor

    from mplus.memory import Memory, StreamView

K, RETRIEVED = 4, 6
CHUNK = 12
SIZES: dict[str, Any] = {
    "chunk_tokens": CHUNK,
    "min_chunk_tokens": 1,
    "memory_tokens_per_chunk": K,
    "short_term_tokens": 10,
    "retrieved_tokens": RETRIEVED,
    "long_term_tokens": 500,
    "retriever": {"name": "linear", "width": 8},
    "adapters": {"rank": 2},
}


def config_for(architecture: Architecture, **changes: Any) -> mplus.MPlusConfig:
    """Return a configuration of small sizes; ALiBi with the positions that the oracle knows."""
    positions = {"memory_positions": "sequential"} if architecture.positions == "alibi" else {}
    return mplus.MPlusConfig.from_dict({**SIZES, **positions, **changes})


@dataclass(frozen=True)
class Pair:
    """A wrapped decoder and the same one left alone.

    Attributes:
        wrapped: with random begin rows, mark and retriever; its LoRA adapters are new, hence without effect.
        plain: in eager attention, as the oracle needs it.
    """

    wrapped: Any
    plain: Any

    def text(self, tokens: int, seed: int = 0) -> Tensor:
        """Draw ids ``[1, tokens]``."""
        return torch.randint(2, VOCAB_SIZE, (1, tokens), generator=torch.Generator().manual_seed(seed))

    def forget_longest_sequence(self) -> None:
        """Run one token: rotary embeddings that remember the longest sequence start anew from a short one."""
        with torch.no_grad():
            self.wrapped(input_ids=self.text(1))

    def new_memory(self, **options: Any) -> Memory:
        """Make an empty memory whose rows have hidden states and, where this decoder allows it, are read projected."""
        projectable = not isinstance(self.wrapped.mplus_engine.projection, str)
        return self.wrapped.new_memory(  # type: ignore[no-any-return]
            memory_rows="both" if projectable else "hidden", **options
        )

    def memory(self, seed: int = 0, chunks: int = 6) -> Memory:
        """Make a memory of ``chunks`` chunks, by default more than the STM holds."""
        memory = self.new_memory(seed=seed)
        memory.write(self.text(chunks * CHUNK, seed=100 + seed)[0], source=f"text {seed}")
        return memory

    @property
    def begin(self) -> list[Tensor]:
        """``[1, d]`` begin row of each layer."""
        return list(self.wrapped.mplus.begin.detach())

    @property
    def mark(self) -> Tensor:
        """``[d]``."""
        return self.wrapped.mplus.mark.detach()[0, 0]  # type: ignore[no-any-return]

    def retrieving(self, view: StreamView) -> Any:
        """Return what lets the oracle retrieve: products with the mean query row by row, the best sorted by birth."""

        def prefix(layer: int, text: Tensor) -> Tensor:
            stored = view.store.gather(layer, view.store.ids(layer))
            query = self.wrapped.mplus.retriever.query_proj[layer](text[0]).mean(0)
            scores = [(query @ key).item() for key in stored.columns()["key"]]
            best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:RETRIEVED]
            best.sort(key=lambda j: int(stored.birth[j]))
            recent = view.state.row_lists()["stm"][layer]
            return torch.cat([self.begin[layer], stored.need_hidden()[best], recent.need_hidden()])

        return prefix

    @staticmethod
    def rows(view: StreamView) -> int:
        """Return the number of memory rows in front of the text."""
        return 1 + min(RETRIEVED, view.store.count(0)) + len(view.state.row_lists()["stm"][0])


def retrofit(architecture: Architecture, implementation: str | None = None, seed: int = 0, **changes: Any) -> Pair:
    """Build both decoders with equal weights and wrap one."""
    wrapped = mplus.wrap(architecture.build(seed, implementation), config_for(architecture, **changes))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        wrapped.mplus.begin.copy_(torch.randn_like(wrapped.mplus.begin))
        wrapped.mplus.mark.copy_(0.5 * torch.randn_like(wrapped.mplus.mark))
        for parameter in () if wrapped.mplus.retriever is None else wrapped.mplus.retriever.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return Pair(wrapped, None if architecture.hybrid else architecture.build(seed, "eager"))
