"""The ways of reading that are measured, each as a function of ids to logits and as single steps behind a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from attrs import define
from torch import Tensor

from mplus.bench.correctness import OK, ReadGate, Verdict, check_backend
from mplus.bench.fixtures.presets import Preset
from mplus.bench.fixtures.setup import PUBLISHED_SCORE, Bed

MEAN_DOT = "mean_dot"


class Reader(Protocol):
    """One way of reading one memory."""

    def before(self) -> None:
        """What must be done before another prompt is read, and does not count."""

    def read(self, ids: Tensor) -> Tensor:
        """Logits ``[1, 1, V]`` of the last of ``[1, T]`` tokens, read anew."""

    def step(self, ids: Tensor) -> Tensor:
        """The same for ``[1, 1]`` tokens behind what was read since ``before``."""


class MemoryReader:
    """mplus itself, through its public interface; every ``read`` is a new reading, retrieval included."""

    def __init__(self, model: Any, memory: Any) -> None:
        self.model, self.memory = model, memory
        self.cache: Any = None

    def before(self) -> None:
        """Drop the cache of the last prompt."""
        self.cache = None

    def read(self, ids: Tensor) -> Tensor:
        """See ``Reader``."""
        output = self.model(input_ids=ids, memory=self.memory, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits  # type: ignore[no-any-return]

    def step(self, ids: Tensor) -> Tensor:
        """See ``Reader``."""
        cache = self.cache
        return self.model(  # type: ignore[no-any-return]
            input_ids=ids, memory=self.memory, past_key_values=cache, logits_to_keep=1
        ).logits


class PrefixReader:
    """The decoder of transformers with a cache that begins with the prefix; nothing is retrieved."""

    def __init__(self, bed: Bed) -> None:
        self.model, self.prefix = bed.base, bed.prefixed_cache()

    def before(self) -> None:
        """Cut the cache back to the prefix."""
        self.prefix.restore()

    def read(self, ids: Tensor) -> Tensor:
        """See ``Reader``."""
        return self.model(input_ids=ids, past_key_values=self.prefix.cache, logits_to_keep=1).logits  # type: ignore[no-any-return]

    step = read


class FloorReader:
    """The layers written out over a buffer; nothing is retrieved."""

    def __init__(self, bed: Bed, room: int) -> None:
        self.floor = bed.floor(room)
        self.past = 0

    def before(self) -> None:
        """Go on behind the prefix."""
        self.past = 0

    def read(self, ids: Tensor) -> Tensor:
        """See ``Reader``."""
        logits = self.floor.read(ids, self.past)
        self.past += ids.shape[1]
        return logits

    step = read


class PublishedReader:
    """The published way, which has no steps of its own here: they are those of a cache of transformers."""

    def __init__(self, bed: Bed) -> None:
        self.read = bed.published().read

    def before(self) -> None:
        """Nothing is kept."""

    def step(self, ids: Tensor) -> Tensor:
        """Not measured."""
        raise NotImplementedError


@define(frozen=True, eq=False)
class Way:
    """A way of reading.

    Attributes:
        name: in tables and records.
        make: builds the reader for a bed, with room for so many text tokens.
        backend, score: of mplus.
        picks: it must retrieve what the published way does.
        compared: it reads the rows that all others read; where not, its backend's check stands for it.
    """

    name: str
    make: Callable[[Bed, int], Reader]
    backend: str | None = None
    score: str | None = None
    picks: bool = False
    compared: bool = True


def ways_with(backend: str) -> list[Way]:
    """mplus with a backend: with the published score, with ``mean_dot``, and with a prefix that is all short-term."""

    def scored(score: str) -> Callable[[Bed, int], Reader]:
        def make(bed: Bed, room: int) -> Reader:
            model = bed.wrapped(backend, score)
            return MemoryReader(model, bed.memory(model))

        return make

    def unretrieved(bed: Bed, room: int) -> Reader:
        return MemoryReader(*bed.without_retrieval(backend))

    return [
        Way(f"mplus/{backend}", scored(PUBLISHED_SCORE), backend, PUBLISHED_SCORE, picks=True),
        Way(f"mplus/{MEAN_DOT}/{backend}", scored(MEAN_DOT), backend, MEAN_DOT),
        Way(f"mplus/no_retrieval/{backend}", unretrieved, backend, None, compared=False),
    ]


PLAIN_WAYS = (
    Way("hf_prefix", lambda bed, room: PrefixReader(bed)),
    Way("floor", FloorReader),
    Way("published", lambda bed, room: PublishedReader(bed), score=PUBLISHED_SCORE, picks=True),
)


@torch.no_grad()
def judged(ways: Sequence[Way], preset: Preset, device: torch.device) -> dict[str, Verdict]:
    """What the gate says about every way: its backend alone, then whole reads, at once and as a prompt and a step."""
    gate = ReadGate(preset, device)
    alone: dict[str, Verdict] = {}
    verdicts = {}
    for way in ways:
        verdict = Verdict()
        if way.backend is not None:
            if way.backend not in alone:
                alone[way.backend] = check_backend(way.backend, preset, device)
            found = alone[way.backend]
            verdict = Verdict(found.status, found.reason, list(found.checks))
        if verdict.status == OK and way.compared:
            gate.check(lambda bed, way=way: _whole(way, bed), way.picks, verdict)  # type: ignore[misc]
            if way.name != "published":
                gate.check(lambda bed, way=way: _in_two(way, bed), retrieves=False, verdict=verdict)  # type: ignore[misc]
        verdicts[way.name] = verdict
    return verdicts


def _whole(way: Way, bed: Bed) -> Callable[[Tensor], Tensor]:
    return way.make(bed, 16).read


def _in_two(way: Way, bed: Bed) -> Callable[[Tensor], Tensor]:
    reader = way.make(bed, 16)

    def read(ids: Tensor) -> Tensor:
        if ids.shape[1] == 1:
            return reader.read(ids)
        reader.read(ids[:, :-1])
        return reader.step(ids[:, -1:])

    return read
