"""What a mechanism returns is checked before anything of a memory changes, in memory and in a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve

import mplus
from mplus.errors import MechanismError, NonFiniteError
from mplus.mechanisms import MECHANISMS
from mplus.memory.sources.table import SourceTable
from mplus.memory.writing.update import Update
from mplus.rows import MemoryRows
from mplus.testing.mechanisms.suite import content_of, unequal
from tests.mechanisms.gists import GistMechanism
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mplus.mechanisms import Absorbed, WriteContext
    from mplus.memory import Memory

PLACES = ("first chunk", "later chunk", "directory")


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A decoder whose memories have a list of rows and a store."""
    MECHANISMS.register("gists", GistMechanism)
    yield tiny.build(mechanism="gists", adapters=None, memory_rows="hidden")
    MECHANISMS.unregister("gists")


def contents(memory: Memory) -> list[Any]:
    return [content_of(state, store) for state, store in zip(memory.states, memory.stores, strict=True)]


def assert_same(memory: Memory, before: list[Any]) -> None:
    assert [unequal(now, then) for now, then in zip(contents(memory), before, strict=True)] == [[], []]


@pytest.fixture
def refused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that writes to two streams while a method of the mechanism does something else.

    The write must fail and change nothing, on disk neither; without the change it goes on.
    """

    def refused(place: str, method: str, change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
        live = place == "directory"
        memory = mplus.Memory.open(tmp_path / "m", model, batch_size=2) if live else model.new_memory(2)
        if place != "first chunk":
            memory.write([tiny.ids(2 * tiny.CHUNK)] * 2, "a")
        before = contents(memory)
        with monkeypatch.context() as patch:
            patch.setattr(GistMechanism, method, change(getattr(GistMechanism, method)))
            with pytest.raises(error, match=message):
                memory.write([tiny.ids(tiny.CHUNK, seed) for seed in (5, 6)], "b")
        assert_same(memory, before)
        if live:
            memory.close()
            memory = mplus.Memory.open(tmp_path / "m", model)
            assert_same(memory, before)
        memory.write([tiny.ids(tiny.CHUNK, seed) for seed in (5, 6)], "b")
        assert [source.name for source in memory.sources()] == (["b"] if place == "first chunk" else ["a", "b"])
        if live:
            memory.close()

    return refused


UPDATES: dict[str, tuple[Callable[[Update], Any], str]] = {
    "no update": (lambda made: list(made.hidden), "an Update with hidden states or projections"),
    "nothing": (lambda made: Update(()), "an Update with hidden states or projections"),
    "a foreign layer": (lambda made: Update((*made.hidden, made.hidden[0])), "3 .* of its layout, got those of 4"),
    "a layer too few": (lambda made: Update(made.hidden[:-1]), "the 3 .* of its layout, got those of 2"),
    "wide rows": (
        lambda made: Update(tuple(torch.cat([one, one], 2) for one in made.hidden)),
        r"floating \[2, k, 32\], got torch.float32 \[2, 16, 64\]",
    ),
    "one stream": (
        lambda made: Update(tuple(one[:1] for one in made.hidden)),
        r"0 as floating \[2, k, 32\], got .* \[1",
    ),
    "uneven": (
        lambda made: Update((*made.hidden[:-1], made.hidden[-1][:, 1:])),
        r"equally many rows .* got \[15, 16\]",
    ),
    "whole numbers": (lambda made: Update(tuple(one.long() for one in made.hidden)), "as floating .* got torch.int64"),
    "only projections": (
        lambda made: Update((), tuple(one[..., :1] for one in made.hidden)),
        "hidden states of rows, as these memories keep them",
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", UPDATES)
def test_a_wrong_update_is_named_and_nothing_is_written(what: str, place: str, refused: Callable[..., None]) -> None:
    spoil, message = UPDATES[what]
    said = f"^the mechanism 'gists': write must return .*{message}"
    refused(place, "write", lambda own: lambda *given: spoil(own(*given)), MechanismError, said)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_is_not_written(place: str, refused: Callable[..., None]) -> None:
    def broken(own: Any) -> Any:
        def write(*given: Any) -> Update:
            made = own(*given)
            return Update((*made.hidden[:-1], made.hidden[-1] * float("nan")))

        return write

    message = r"got NaN or Inf in layer 2 for a chunk of 16 tokens \(write of the mechanism 'gists'\)"
    refused(place, "write", broken, NonFiniteError, message)


def rows(width: int = 32) -> MemoryRows:
    return MemoryRows(torch.zeros(1, width), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def with_state(**changes: Any) -> Callable[[Absorbed, WriteContext], Absorbed]:
    return lambda done, context: evolve(done, state=evolve(done.state, **changes))


def stored(layer: int, width: int = 32) -> Callable[[Absorbed, WriteContext], Absorbed]:
    def store(done: Absorbed, context: WriteContext) -> Absorbed:
        context.store.append(layer, rows(width))
        return done

    return store


ABSORBED: dict[str, tuple[Callable[[Any, WriteContext], Any], str]] = {
    "nothing": (lambda done, context: None, "must return an Absorbed with a state of class GistState, got NoneType"),
    "a state": (lambda done, context: done.state, "an Absorbed with a state of class GistState, got GistState"),
    "no state": (lambda done, context: evolve(done, state="x"), "of class GistState, got Absorbed of str"),
    "a new state": (with_state(sources=SourceTable()), "got one with sources, texts or a tail of its own"),
    "an earlier clock": (with_state(clock=-1), "a state whose clock is at least [02], as it was, got -1"),
    "a list too short": (
        with_state(gists=(rows(), rows())),
        r"whose lists of rows are as its layout says: .* gists for 3 \w+, got {'gists': 2}",
    ),
    "wide rows in a list": (
        with_state(gists=(rows(), rows(), rows(33))),
        r"gists of \w+ 2: column 'hidden' must be .* 33",
    ),
    "a foreign layer": (stored(3), "failed: layer must be in 0..2, got 3"),
    "wide rows": (stored(0, 33), r"failed: column 'hidden' of 1 rows must be \[1, 32\] .* got \[1, 33\]"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ABSORBED)
def test_what_absorb_does_wrong_is_named_and_taken_back(what: str, place: str, refused: Callable[..., None]) -> None:
    spoil, message = ABSORBED[what]

    def change(own: Any) -> Any:
        return lambda self, state, update, source, context: spoil(own(self, state, update, source, context), context)

    refused(place, "absorb", change, MechanismError, f"^the mechanism 'gists': absorb .*{message}")
