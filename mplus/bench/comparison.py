"""Ways of reading side by side: who takes part, and what a record says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import define, evolve

from mplus.bench.correctness import OK, Verdict
from mplus.bench.fixtures.setup import PUBLISHED_SCORE, Bed
from mplus.bench.readers import FloorReader, Reader, Way
from mplus.bench.record import arm_entry
from mplus.timing import median


@define(frozen=True, eq=False)
class Contest:
    """Ways of reading one bed.

    Attributes:
        bed: what is read.
        ways: all that a record tells of.
        verdicts: of the gate, by way.
        readers: of the ways that passed it.
    """

    bed: Bed
    ways: Sequence[Way]
    verdicts: Mapping[str, Verdict]
    readers: Mapping[str, Reader]

    @classmethod
    def of(cls, bed: Bed, ways: Sequence[Way], verdicts: Mapping[str, Verdict], room: int) -> Contest:
        """With a new reader, for up to ``room`` text tokens, of every way that passed the gate."""
        return cls(
            bed, ways, verdicts, {way.name: way.make(bed, room) for way in ways if verdicts[way.name].status == OK}
        )

    def only(self, wanted: Callable[[Way], bool]) -> Contest:
        """Those that passed the gate and are wanted."""
        ways = [way for way in self.ways if way.name in self.readers and wanted(way)]
        return evolve(self, ways=ways, readers={way.name: self.readers[way.name] for way in ways})

    def choose_floor(self, length: int, past: int = 0) -> dict[str, Any]:
        """Let the floor take the fastest attention for ``length`` tokens behind ``past``; returns what was tried."""
        tried: dict[str, Any] = {}
        for reader in self.readers.values():
            if isinstance(reader, FloorReader):
                tried = reader.floor.choose(length, past)
        return tried

    def entries(
        self, times: Mapping[str, Sequence[float]], share: Callable[[float], float] | None = None
    ) -> dict[str, Any]:
        """What a record says of every way; ``share`` makes the share of the roofline out of the median in seconds."""
        found = {}
        for way in self.ways:
            taken = times.get(way.name)
            facts = {} if share is None else {"share_of_roofline": share(median(taken)) if taken else None}
            found[way.name] = arm_entry(self.verdicts[way.name], taken, **facts)
        return found

    def best_backend(self, times: Mapping[str, Sequence[float]]) -> str | None:
        """The backend with the lowest median among reads with the published score; None where none was measured."""
        found = [way for way in self.ways if way.score == PUBLISHED_SCORE and way.backend and times.get(way.name)]
        return min(found, key=lambda way: median(times[way.name])).backend if found else None
