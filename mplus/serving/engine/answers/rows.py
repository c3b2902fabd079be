"""Rows: the answers that are generated at once, each behind a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.config import MPlusConfig
from mplus.hf.reading.reading import RetrievedSource
from mplus.memory.memory import Memory
from mplus.serving.messages import Source


@define(frozen=True, eq=False)
class Prompt:
    """A prompt that is to be answered.

    Attributes:
        memory: what is read; None: nothing.
        ids: its tokens.
        min_score: bring back only what scores higher; None: as configured.
        question: ids to retrieve with; None: the prompt's own.
    """

    memory: Memory | None
    ids: Sequence[int]
    min_score: float | None = None
    question: Sequence[int] | None = None


@define(eq=False)
class Row:
    """An answer that is being generated.

    Attributes:
        prompt: what is answered.
        logits: ``[V]`` of the next token.
        sources: what came back, best first.
        cache: keys and values of the text so far.
    """

    prompt: Prompt
    logits: Tensor
    sources: Sequence[Source]
    cache: Any


class Rows:
    """Reads prompts, and tokens one by one, with the wrapped decoder.

    Attributes:
        model: the wrapped decoder.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def join(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Read prompts; the rows are stepped from now on. Raises as a read does; then none has joined."""
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: Prompt) -> Row:
        ids = torch.tensor([list(prompt.ids)], device=self.model.device)
        options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        if prompt.memory is not None:
            options |= {"memory": prompt.memory, "output_sources": True}
            if prompt.min_score is not None:
                options["min_score"] = prompt.min_score
            if prompt.question is not None:
                options["retrieval_query"] = tuple(prompt.question)
        output = self.model(ids, **options)
        found = [] if prompt.memory is None else output.memory_sources[0]
        config = self.model.mplus_engine.config
        return Row(prompt, output.logits[0, -1], sources_of(found, config), output.past_key_values)

    @torch.no_grad()
    def step(self, rows: Sequence[Row], ids: Sequence[int]) -> Tensor:
        """Read one more token of every row, and return the logits ``[B, V]`` of what follows."""
        for row, token in zip(rows, ids, strict=True):
            options: dict[str, Any] = {"use_cache": True, "past_key_values": row.cache, "logits_to_keep": 1}
            if row.prompt.memory is not None:
                options |= {"memory": row.prompt.memory, "reuse_memory_cache": True}
            row.logits = self.model(torch.tensor([[token]], device=self.model.device), **options).logits[0, -1]
        return torch.stack([row.logits for row in rows])

    def leave(self, rows: Sequence[Row]) -> None:
        """Let rows go."""
        for row in rows:
            row.cache = None


def sources_of(layers: Sequence[Sequence[RetrievedSource]], config: MPlusConfig) -> list[Source]:
    """Return what came back for one prompt, by source, the best first.

    Args:
        layers: what each layer retrieved.
        config: of the memory; a chunk of ``chunk_tokens`` left ``memory_tokens_per_chunk`` rows.
    """
    by_name: dict[str | None, list[RetrievedSource]] = {}
    for one in (one for layer in layers for one in layer):
        by_name.setdefault(one.source, []).append(one)
    found = []
    for name, rows in by_name.items():
        scores = [one.score for one in rows if one.score is not None]
        written = next((one.written for one in rows if one.written is not None), None)
        found.append(
            Source(
                source=name,
                rows=sum(one.tokens for one in rows),
                score=max(scores, default=None),
                age=text_age(min(one.age for one in rows), config),
                written=None if written is None else written.isoformat(timespec="seconds"),
            )
        )
    return sorted(found, key=lambda one: (one.score is None, -(one.score or 0.0), one.age))


def text_age(rows: int, config: MPlusConfig) -> int:
    """Return how many text tokens left so many rows in a layer."""
    return rows * config.chunk_tokens // config.memory_tokens_per_chunk
