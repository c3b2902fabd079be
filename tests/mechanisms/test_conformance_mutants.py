"""Mechanisms that break a rule each, and the test of ``MechanismConformance`` that sees it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from attrs import define, evolve

from mplus.errors import MPlusError
from mplus.mechanisms.root import Absorbed
from mplus.memory.state import StreamState
from mplus.memory.writing.update import Update
from mplus.testing.mechanisms import MechanismConformance
from tests.helpers.examples import classes_of

EXAMPLE = classes_of("write_a_mechanism")
TokenMemory = EXAMPLE["TokenMemory"]
side_by_side = EXAMPLE["side_by_side"]


@define(frozen=True, eq=False, kw_only=True)
class LastIds(StreamState):
    """Keeps the ids of the last chunk, whatever is forgotten."""

    last: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"last": self.last}


class Remembers(TokenMemory):
    name, State = "remembers", LastIds

    def new_state(self, layout: Any, columns: Any = None) -> LastIds:
        return LastIds(last=torch.empty(0, dtype=torch.int64))

    def absorb(self, state: Any, update: Update, source: int, context: Any) -> Absorbed:
        done = super().absorb(state, update, source, context)
        return done if context.ids is None else evolve(done, state=evolve(done.state, last=context.ids.clone()))


class MixesStreams(TokenMemory):
    name = "mixes"

    def write(self, *given: Any) -> Update:
        return Update(tuple(rows.flip(0) for rows in super().write(*given).hidden))


class ReadsTheFirstStream(TokenMemory):
    name = "first"

    def prefix(self, opened: Any, *given: Any) -> Any:
        return super().prefix(evolve(opened, views=opened.views[:1] * len(opened.views)), *given)


class SeesItself(TokenMemory):
    """Says it puts nothing in front of the text while it is empty, and puts a row of zeros there."""

    name = "zeros"

    def prefix(self, opened: Any, layer: int, found: Any, hidden: Any, project: Any) -> Any:
        zeros = hidden.new_zeros(1, hidden.shape[-1])
        rows = [view.store.gather(layer, view.store.ids(layer)).need_hidden().to(hidden) for view in opened.views]
        return (project(side_by_side([torch.cat([zeros, one]) for one in rows])),)

    def prefix_rows(self, view: Any) -> int:
        return super().prefix_rows(view) + 1


class CountsWrong(TokenMemory):
    name = "miscounts"

    def prefix_rows(self, view: Any) -> int:
        rows: int = super().prefix_rows(view)
        return rows and rows + 1


class CountsItsWrites(TokenMemory):
    """Keeps something of every write in the class: what fails or happens in a copy leaves its trace."""

    name, writes = "counts", 0

    def absorb(self, state: Any, update: Update, source: int, context: Any) -> Absorbed:
        type(self).writes += 1
        done = super().absorb(state, update, source, context)
        return evolve(done, state=evolve(done.state, clock=done.state.clock + self.writes))


class ReadsPadding(TokenMemory):
    """Lets the text's length decide what is read."""

    name = "padding"

    def prefix(self, opened: Any, layer: int, found: Any, hidden: Any, project: Any) -> Any:
        rows = [view.store.gather(layer, view.store.ids(layer)).need_hidden().to(hidden) for view in opened.views]
        return (project(side_by_side([one * hidden.shape[1] for one in rows])),)


MUTANTS = {
    Remembers: "test_a_forgotten_source_leaves_no_trace",
    MixesStreams: "test_streams_that_are_written_and_read_together_are_as_alone",
    ReadsTheFirstStream: "test_streams_that_are_written_and_read_together_are_as_alone",
    CountsWrong: "test_prefix_rows_are_those_of_the_layer_that_sees_most",
    CountsItsWrites: "test_a_copy_goes_on_by_itself",
    ReadsPadding: "test_padding_on_the_left_is_not_seen",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_seen(mutant: type, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = type("Suite", (MechanismConformance,), {"implementation": mutant})
    test = getattr(suite(), MUTANTS[mutant])
    given = [monkeypatch] if "monkeypatch" in inspect.signature(test).parameters else []
    with suite.wrapped() as model, pytest.raises(AssertionError):
        test(model, *given)


def test_a_mutant_of_the_empty_read_is_refused_by_wrap() -> None:
    suite = type("Suite", (MechanismConformance,), {"implementation": SeesItself})
    with pytest.raises(MPlusError, match="empty memory = base model, bit for bit"), suite.wrapped():
        pytest.fail("it was wrapped")
