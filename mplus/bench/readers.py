"""The variants of reading that are compared: mplus by backend, transformers, the bare layers, the published code.

A ``ReadVariant`` makes a ``Reader`` for a fixture: a function of ids to logits, and single steps behind a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.bench.baselines import AttentionChoice
from mplus.bench.correctness import OK, CheckResult, ReadCheck, check_backend
from mplus.bench.fixture import PUBLISHED_SCORE, BenchmarkFixture
from mplus.bench.presets import Preset
from mplus.bench.record import Entry, arm_entry
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.types import Cache
from mplus.memory.memory import Memory
from mplus.timing import median

MEAN_DOT = "mean_dot"


class Reader(Protocol):
    """An implementation of reading with one memory in front of the text."""

    def reset(self) -> None:
        """Forget the last prompt; called before the next one, and not timed."""

    def read(self, ids: Tensor) -> Tensor:
        """Return logits ``[1, 1, V]`` of the last of ``[1, T]`` tokens, with a new reading of the memory."""

    def step(self, ids: Tensor) -> Tensor:
        """Return the same for ``[1, 1]`` tokens behind everything that was read since ``reset``."""


class MemoryReader:
    """mplus itself, through its public interface; every ``read`` retrieves anew."""

    def __init__(self, model: MemoryModel, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self.cache: Cache | None = None

    def reset(self) -> None:
        """Drop the cache of the last prompt."""
        self.cache = None

    def read(self, ids: Tensor) -> Tensor:
        """Read a prompt ``[B, T]`` int64, and keep its cache for steps."""
        output = self.model(input_ids=ids, memory=self.memory, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits  # type: ignore[no-any-return]

    def step(self, ids: Tensor) -> Tensor:
        """Read one token ``[B, 1]`` int64 behind the cache."""
        cache = self.cache
        return self.model(  # type: ignore[no-any-return]
            input_ids=ids, memory=self.memory, past_key_values=cache, logits_to_keep=1
        ).logits


class PrefixReader:
    """The decoder of transformers with a cache that begins with the prefix; nothing is retrieved."""

    def __init__(self, fixture: BenchmarkFixture) -> None:
        self.model, self.prefix = fixture.base, fixture.prefixed_cache()

    def reset(self) -> None:
        """Cut the cache back to the prefix."""
        self.prefix.restore()

    def read(self, ids: Tensor) -> Tensor:
        """Read tokens ``[B, T]`` int64 behind the cache."""
        return self.model(input_ids=ids, past_key_values=self.prefix.cache, logits_to_keep=1).logits  # type: ignore[no-any-return]

    step = read


class BareReader:
    """The bare layers over a buffer of ready keys and values; nothing is retrieved."""

    def __init__(self, fixture: BenchmarkFixture, room: int) -> None:
        self.layers = fixture.bare_layers(room)
        self.past = 0

    def reset(self) -> None:
        """Go on behind the prefix."""
        self.past = 0

    def read(self, ids: Tensor) -> Tensor:
        """Read tokens ``[B, T]`` int64 behind those read before."""
        logits = self.layers.read(ids, self.past)
        self.past += ids.shape[1]
        return logits

    step = read


class PublishedReader:
    """The published read, which has no steps of its own here: they are those of a cache of transformers."""

    def __init__(self, fixture: BenchmarkFixture) -> None:
        self.read = fixture.published().read

    def reset(self) -> None:
        """Do nothing: a read keeps nothing."""

    def step(self, ids: Tensor) -> Tensor:
        """Raise NotImplementedError: steps are not measured."""
        raise NotImplementedError


@define(frozen=True, eq=False)
class ReadVariant:
    """One of the compared implementations of reading.

    Attributes:
        name: in tables and records.
        make: builds the reader for a fixture, with room for so many text tokens.
        backend, score: of mplus.
        retrieves: it must retrieve what the published read does.
        compared: it reads the rows that all others read; where not, its backend's check stands for it.
    """

    name: str
    make: Callable[[BenchmarkFixture, int], Reader]
    backend: str | None = None
    score: str | None = None
    retrieves: bool = False
    compared: bool = True


def mplus_variants(backend: str) -> list[ReadVariant]:
    """Return mplus with a backend: by the published score, by ``mean_dot``, and with an all short-term prefix."""

    def by_score(score: str) -> Callable[[BenchmarkFixture, int], Reader]:
        def make(fixture: BenchmarkFixture, room: int) -> Reader:
            model = fixture.wrapped(backend, score)
            return MemoryReader(model, fixture.memory(model))

        return make

    def without_retrieval(fixture: BenchmarkFixture, room: int) -> Reader:
        return MemoryReader(*fixture.without_retrieval(backend))

    return [
        ReadVariant(f"mplus/{backend}", by_score(PUBLISHED_SCORE), backend, PUBLISHED_SCORE, retrieves=True),
        ReadVariant(f"mplus/{MEAN_DOT}/{backend}", by_score(MEAN_DOT), backend, MEAN_DOT),
        ReadVariant(f"mplus/no_retrieval/{backend}", without_retrieval, backend, None, compared=False),
    ]


BASELINES = (
    ReadVariant("hf_prefix", lambda fixture, room: PrefixReader(fixture)),
    ReadVariant("floor", BareReader),
    ReadVariant("published", lambda fixture, room: PublishedReader(fixture), score=PUBLISHED_SCORE, retrieves=True),
)


@torch.no_grad()
def verify(variants: Sequence[ReadVariant], preset: Preset, device: torch.device) -> dict[str, CheckResult]:
    """Check every variant: its backend alone, then whole reads, at once and as a prompt and a step."""
    reads = ReadCheck(preset, device)
    backends: dict[str, CheckResult] = {}
    results = {}
    for variant in variants:
        result = CheckResult()
        if variant.backend is not None:
            if variant.backend not in backends:
                backends[variant.backend] = check_backend(variant.backend, preset, device)
            alone = backends[variant.backend]
            result = CheckResult(alone.status, alone.reason, list(alone.checks))
        if result.status == OK and variant.compared:
            reads.check(lambda fixture, make=variant.make: make(fixture, 16).read, variant.retrieves, result)  # type: ignore[misc]
            if variant.name != "published":
                reads.check(lambda fixture, make=variant.make: _in_two(make(fixture, 16)), False, result)  # type: ignore[misc]
        results[variant.name] = result
    return results


def _in_two(reader: Reader) -> Callable[[Tensor], Tensor]:
    """Return a read of all tokens but the last as a prompt and of the last as a step."""

    def read(ids: Tensor) -> Tensor:
        if ids.shape[1] == 1:
            return reader.read(ids)
        reader.read(ids[:, :-1])
        return reader.step(ids[:, -1:])

    return read


@define(frozen=True, eq=False)
class Comparison:
    """Variants of reading one fixture.

    Attributes:
        fixture: what is read.
        variants: all that a record has an entry for.
        results: of their checks, by name.
        readers: of the variants that are right, by name.
    """

    fixture: BenchmarkFixture
    variants: Sequence[ReadVariant]
    results: Mapping[str, CheckResult]
    readers: Mapping[str, Reader]

    @classmethod
    def of(
        cls,
        fixture: BenchmarkFixture,
        variants: Sequence[ReadVariant],
        results: Mapping[str, CheckResult],
        room: int,
    ) -> Comparison:
        """Make a new reader, for up to ``room`` text tokens, of every variant that is right."""
        right = [variant for variant in variants if results[variant.name].status == OK]
        return cls(fixture, variants, results, {variant.name: variant.make(fixture, room) for variant in right})

    def only(self, wanted: Callable[[ReadVariant], bool]) -> Comparison:
        """Return the comparison of those that are right and wanted."""
        variants = [variant for variant in self.variants if variant.name in self.readers and wanted(variant)]
        return evolve(self, variants=variants, readers={one.name: self.readers[one.name] for one in variants})

    def choose_attention(self, length: int, past: int = 0) -> AttentionChoice:
        """Let the bare layers take the fastest attention for this length; return what was tried.

        Args:
            length: tokens read at once.
            past: tokens in front of them, behind the prefix.
        """
        for reader in self.readers.values():
            if isinstance(reader, BareReader):
                return reader.layers.choose_attention(length, past)
        return {}

    def entries(
        self, times: Mapping[str, Sequence[float]], share: Callable[[float], float] | None = None
    ) -> dict[str, Entry]:
        """Return a record's entries for all variants.

        Args:
            times: in seconds, by name.
            share: makes the share of the roofline out of the median in seconds.
        """
        entries: dict[str, Entry] = {}
        for variant in self.variants:
            taken = times.get(variant.name)
            entry = arm_entry(self.results[variant.name], taken)
            if share is not None and taken and entry["status"] == OK:
                entry["share_of_roofline"] = share(median(taken))
            entries[variant.name] = entry
        return entries

    def best_backend(self, times: Mapping[str, Sequence[float]]) -> str | None:
        """Return the backend with the lowest median among reads by the published score; None where none was timed."""
        timed = [one for one in self.variants if one.score == PUBLISHED_SCORE and one.backend and times.get(one.name)]
        return min(timed, key=lambda one: median(times[one.name])).backend if timed else None
