"""What a generation retrieved, and from where."""

from __future__ import annotations

from attrs import define

from mplus.hf.reading import Reading


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
    """For every batch row of the memory and every memory layer, the rows retrieved last, oldest first."""
    streams: list[list[list[RetrievedSource]]] = []
    for row, view in enumerate(reading.views):
        layers = []
        for layer in sorted(reading.retrieved):
            found = reading.retrieved[layer][row]
            entries = []
            for i in range(0 if found is None else len(found.ids)):
                assert found is not None  # the range above is empty otherwise
                number = int(found.rows.source[i])
                name = view.state.sources[number].name if 0 <= number < len(view.state.sources) else None
                age = view.state.clock - 1 - int(found.rows.birth[i])
                entries.append(RetrievedSource(layer, name, age, float(found.scores[i]) if len(found.scores) else None))
            layers.append(entries)
        streams.append(layers)
    return streams
