"""The rows that a generation retrieved, and the sources they come from."""

from __future__ import annotations

from attrs import define

from mplus.hf.reading.reading import Reading
from mplus.mechanisms.opened import Retrieved
from mplus.memory.state import StreamView
from mplus.rows import NO_SOURCE


@define(frozen=True)
class RetrievedSource:
    """One retrieved row.

    Attributes:
        layer: index among the layers that carry memory.
        source: name given to ``Memory.write``, or None.
        age: rows written since, per layer (0: the newest).
        score: the retriever's score, or None where nothing was scored.
    """

    layer: int
    source: str | None
    age: int
    score: float | None


def retrieved_sources(reading: Reading) -> list[list[list[RetrievedSource]]]:
    """Return, for every batch row of the memory and every memory layer, the rows retrieved last, oldest first."""
    opened = reading.opened if reading.mechanism.retrieves_in_open else None
    by_layer = {
        layer: found if opened is None else reading.mechanism.retrieved(opened, layer)
        for layer, found in sorted(reading.retrieved.items())
    }
    streams: list[list[list[RetrievedSource]]] = []
    for row, view in enumerate(reading.views if opened is None else opened.views):
        layers = []
        for layer, rows in by_layer.items():
            found = rows[row]
            layers.append([] if found is None else [_described(layer, found, i, view) for i in range(len(found.ids))])
        streams.append(layers)
    return streams


def _described(layer: int, found: Retrieved, place: int, view: StreamView) -> RetrievedSource:
    number = int(found.rows.source[place])
    return RetrievedSource(
        layer=layer,
        source=None if number == NO_SOURCE else view.state.sources[number].name,
        age=view.state.clock - 1 - int(found.rows.birth[place]),
        score=float(found.scores[place]) if len(found.scores) else None,
    )
