"""Mechanisms that break a rule each, and the test of ``MechanismConformance`` that sees it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import define, evolve

from mplus.errors import MPlusError, NotSupported
from mplus.mechanisms.opened import Opened
from mplus.mechanisms.root import Absorbed
from mplus.memory.state import StreamState
from mplus.memory.writing.update import Update
from mplus.testing.mechanisms import MechanismConformance
from tests.helpers.examples import classes_of

if TYPE_CHECKING:
    from pathlib import Path

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


class HidesWhatWaits(TokenMemory):
    """Lets short texts wait, and does not show them to its reads."""

    name, shortest_text = "hides", 8


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


class HidesState(TokenMemory):
    """Adds to its rows how many chunks were written, and does not say that it keeps that."""

    name = "hides"

    @define(frozen=True, eq=False, kw_only=True)
    class State(StreamState):
        chunks: int = 0

    def absorb(self, state: Any, update: Update, source: int, context: Any) -> Absorbed:
        moved = Update(tuple(rows + state.chunks for rows in update.hidden))
        done = super().absorb(state, moved, source, context)
        return evolve(done, state=evolve(done.state, chunks=state.chunks + 1))


class Carries(TokenMemory):
    """Keeps something of a chunk in the mechanism itself, where the next write finds it, whosever it is."""

    name, carried = "carries", 0.0

    def write(self, *given: Any) -> Update:
        found = super().write(*given).hidden
        type(self).carried += float(found[0].detach().mean())
        return Update(tuple(rows + self.carried for rows in found))


class ReadsWhileWriting(TokenMemory):
    """A chunk reads the rows of all earlier ones when it is written, and says that it does not."""

    name, isolated_sources = "reads", True

    def write(self, decoder: Any, views: Any, text: Any) -> Update:
        def prefix(layer: int, hidden: torch.Tensor, project: Any) -> Any:
            return self.prefix(Opened(views), layer, (), hidden, project) if self.prefix_rows(views[0]) else ()

        rows = self.prefix_rows(views[0])
        found = decoder.run(text.ids, adapter="write", prefix=prefix, prefix_rows=rows, collect={"inputs"})
        return Update(found.inputs)


class HoldsHalf(TokenMemory):
    """Says that a row is half a token."""

    name = "half-held"

    def capacity(self, rows: int) -> int:
        return rows // 2


class Grows(TokenMemory):
    """Keeps every row, however many there may be."""

    name = "grows"

    def absorb(self, state: Any, update: Update, source: int, context: Any) -> Absorbed:
        return super().absorb(state, update, source, evolve(context, capacity=None))


class LearnsNothing(TokenMemory):
    """Has a parameter that no gradient reaches."""

    name = "detached"

    @classmethod
    def build(cls, shape: Any, config: Any, options: Any) -> torch.nn.Module:
        module = torch.nn.Module()
        module.scale = torch.nn.Parameter(torch.ones(shape.width))
        return module

    def write(self, *given: Any) -> Update:
        return Update(tuple(rows * self.additions.scale.detach() for rows in super().write(*given).hidden))


class Unread(TokenMemory):
    """Writes, and says that there is nothing to read."""

    name = "unread"

    def prefix_rows(self, view: Any) -> int:
        return 0


class NamedAsABaseline(TokenMemory):
    """Has the name of an arm that is something else."""

    name = "window"


MUTANTS = [
    (Remembers, "test_a_forgotten_source_leaves_no_trace"),
    (HidesWhatWaits, "test_a_short_text_changes_what_is_read"),
    (MixesStreams, "test_streams_that_are_written_and_read_together_are_as_alone"),
    (ReadsTheFirstStream, "test_streams_that_are_written_and_read_together_are_as_alone"),
    (CountsWrong, "test_prefix_rows_are_those_of_the_layer_that_sees_most"),
    (CountsItsWrites, "test_a_copy_goes_on_by_itself"),
    (ReadsPadding, "test_padding_on_the_left_is_not_seen"),
    (HidesState, "test_a_saved_memory_goes_on_as_the_one_that_was_saved"),
    (HidesState, "test_a_record_that_a_crash_tore_was_never_written"),
    (Carries, "test_rebuilding_takes_back_what_later_chunks_took_in"),
    (Carries, "test_it_trains"),
    (ReadsWhileWriting, "test_sources_are_isolated_or_it_says_that_they_are_not"),
    (HoldsHalf, "test_rows_hold_as_much_text_as_capacity_says"),
    (Grows, "test_no_list_of_the_store_grows_beyond_its_capacity"),
    (LearnsNothing, "test_gradients_reach_its_own_parameters_and_nothing_that_is_frozen"),
    (LearnsNothing, "test_it_trains"),
]


def run(suite: type[MechanismConformance], name: str, **fixtures: Any) -> None:
    """Run one test of a suite with the fixtures that it asks for."""
    test = getattr(suite(), name)
    asked = inspect.signature(test).parameters
    with suite.wrapped() as model:
        test(**{name: value for name, value in {**fixtures, "model": model}.items() if name in asked})


@pytest.mark.parametrize(("mutant", "name"), MUTANTS, ids=lambda value: getattr(value, "name", value))
def test_a_mutant_is_seen(mutant: type, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = type("Suite", (MechanismConformance,), {"implementation": mutant})
    with pytest.raises(AssertionError):
        run(suite, name, monkeypatch=monkeypatch, tmp_path=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutant", [MixesStreams, ReadsTheFirstStream], ids=lambda mutant: mutant.name)
def test_no_tolerance_hides_a_mutant(mutant: type, dtype: torch.dtype) -> None:
    suite = type("Suite", (MechanismConformance,), {"implementation": mutant, "dtype": dtype})
    with pytest.raises(AssertionError):
        run(suite, "test_streams_that_are_written_and_read_together_are_as_alone")


def test_a_mechanism_named_as_a_baseline_is_refused_as_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = type("Suite", (MechanismConformance,), {"implementation": NamedAsABaseline})
    with pytest.raises(NotSupported, match="'window' has the name of an arm"):
        run(suite, "test_it_is_an_arm_of_retention", monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [(SeesItself, "empty memory = base model, bit for bit"), (Unread, "memory acts")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_mutant_is_refused_by_wrap(mutant: type, message: str) -> None:
    suite = type("Suite", (MechanismConformance,), {"implementation": mutant})
    with pytest.raises(MPlusError, match=message), suite.wrapped():
        pytest.fail("it was wrapped")
