"""Rows that join, step and leave in any order say what each says alone, whatever is written meanwhile."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mplus
from mplus.errors import MemoryMismatchError
from mplus.hf.batch.requests import RowRequest
from tests.helpers.modes import on_every_change
from tests.hf.batch.alone import Alone, Company, alone
from tests.hf.batch.readers import memories, wrapped
from tests.memory.tiny import ids

if TYPE_CHECKING:
    from mplus.hf.batch.joining import Joining
    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations

NEW, MOST_ROWS, LENGTHS = 6, 10, (1, 3, 9, 24)
ROWS = st.lists(
    st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(0, len(LENGTHS) - 1), st.sampled_from([None] * 5 + [2])),
    min_size=1,
    max_size=4,
)


@functools.cache
def written(mechanism: str, number: int, writes: int) -> Memory:
    """A memory and so many further writes to it."""
    if not writes:
        return memories(wrapped(mechanism))[number]
    memory = written(mechanism, number, writes - 1).fork()
    memory.write(ids(20, seed=900 + writes), source=f"later {writes}")
    return memory


@functools.cache
def answer(mechanism: str, number: int | None, writes: int, prompt: int, every: int | None) -> Alone:
    memory = None if number is None else written(mechanism, number, writes)
    asked = RowRequest(memory, ids(LENGTHS[prompt], seed=prompt), max_new_tokens=NEW, retrieve_every=every)
    return alone(wrapped(mechanism), asked, NEW)


class Rows(RuleBasedStateMachine):
    """Follows every row by what it says alone."""

    mechanism: str

    @initialize()
    def begin(self) -> None:
        self.company = Company(mplus.BatchReader(wrapped(self.mechanism)))
        self.memories = [written(self.mechanism, number, 0).fork() for number in range(3)]
        self.writes = [0, 0, 0]
        self.joinings: list[tuple[Joining, list[Alone]]] = []

    @property
    def reader(self) -> Any:
        return self.company.reader

    def asked(self, rows: Any) -> tuple[list[RowRequest], list[Alone]]:
        requests, answers = [], []
        for number, prompt, often in rows:
            every = None if number is None or self.mechanism == "memoryllm" else often
            memory, writes = (None, 0) if number is None else (self.memories[number], self.writes[number])
            given = ids(LENGTHS[prompt], seed=prompt)
            requests.append(RowRequest(memory, given, max_new_tokens=NEW, retrieve_every=every))
            answers.append(answer(self.mechanism, number, writes, prompt, every))
        return requests, answers

    @precondition(lambda self: len(self.reader.rows) < MOST_ROWS)
    @rule(rows=ROWS)
    def join(self, rows: Any) -> None:
        self.company.join(*self.asked(rows))

    @precondition(lambda self: len(self.reader.rows) < MOST_ROWS and len(self.joinings) < 2)
    @rule(rows=ROWS)
    def begin_to_join(self, rows: Any) -> None:
        requests, answers = self.asked(rows)
        self.joinings.append((self.reader.begin(requests), answers))

    @precondition(lambda self: self.joinings)
    @rule(tokens=st.integers(1, 40))
    def go_on_joining(self, tokens: int) -> None:
        joining, answers = self.joinings[0]
        joining.advance(tokens)
        here = set(self.reader.rows)
        for row, one in zip(joining.rows, answers, strict=True):
            if row in here and row not in self.company.answers:
                self.company.met(row, one)
        if joining.done:
            del self.joinings[0]

    @rule()
    def join_badly(self) -> None:
        before = self.reader.rows
        foreign, broken = self.reader.join([(wrapped("foreign").new_memory(), [1]), (None, [])])
        assert isinstance(foreign.error, MemoryMismatchError)
        assert broken.error is not None
        assert self.reader.rows == before

    @rule()
    def step(self) -> None:
        self.company.step()

    @precondition(lambda self: self.reader.rows)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        rows = self.reader.rows
        places = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
        self.company.leave([rows[place] for place in places])

    # A prompt that waits reads what its memory holds when it is read, so answers would have to be made then.
    @precondition(lambda self: not self.joinings)
    @rule(number=st.integers(0, 2))
    def write(self, number: int) -> None:
        if self.writes[number] < 2:
            self.writes[number] += 1
            self.memories[number].write(ids(20, seed=900 + self.writes[number]), source=f"later {self.writes[number]}")

    @invariant()
    def rows_are_known(self) -> None:
        assert set(self.reader.rows) == set(self.company.answers)


@pytest.mark.parametrize("mechanism", ["mplus", "kv", "memoryllm"])
def test_every_row_says_what_it_says_alone(mechanism: str) -> None:
    machine = type("Machine", (Rows,), {"mechanism": mechanism})
    # At night each takes more than 10,000 steps: an example ends before the most that it may take.
    examples = {"max_examples": on_every_change(4, nightly=260), "stateful_step_count": on_every_change(25, nightly=50)}
    run_state_machine_as_test(machine, settings=settings(**examples))
