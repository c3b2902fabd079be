"""Sources: what came back from memory for a prompt, as clients see it."""

from __future__ import annotations

from collections.abc import Sequence

from mplus.config import MPlusConfig
from mplus.hf.reading.reading import RetrievedSource
from mplus.serving.messages import Source


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
