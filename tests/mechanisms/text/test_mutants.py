"""Memories of text that break a rule each, and the test of ``TextMechanismConformance`` that sees it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from mplus.mechanisms import Recalled, TextMechanism
from mplus.mechanisms.notes import NotesMechanism
from mplus.testing.mechanisms import TextMechanismConformance
from tests.mechanisms.text.phonebook import Triples

if TYPE_CHECKING:
    from pathlib import Path


class LeaksAfterForget(NotesMechanism):
    """Also writes what other sources said, as it remembers that in the class."""

    name, last = "leaks", ""

    def write(self, entries: Any, passage: str, before: str, ask: Any) -> Any:
        found = [(f"{type(self).last} {passage}".strip(),)]
        type(self).last = passage
        return found


class MixesStreams(NotesMechanism):
    name, seen = "mixes", ()

    def recall(self, entries: Any, prompt: str, ask: Any, budget: Any) -> Recalled:
        known = dict.fromkeys((*type(self).seen, *entries))
        type(self).seen = tuple(known)
        found = super().recall(type(self).seen, prompt, ask, budget)
        return Recalled(found.text)


class IsNeverEmpty(NotesMechanism):
    """Begins with an entry that nobody wrote."""

    name = "never-empty"

    def new_state(self, layout: Any, columns: Any = None) -> Any:
        state, number = super().new_state(layout, columns).with_source(None, 1)
        return state.with_entries([("You keep the lamp in the barn.",)], number)


class TakesTooMuch(NotesMechanism):
    name = "too-much"

    def recall(self, entries: Any, prompt: str, ask: Any, budget: Any) -> Recalled:
        return Recalled("".join(entry.fields[0] for entry in entries), tuple(entries))


class CountsReads(NotesMechanism):
    """Recalls less at every second read."""

    name, reads = "counts", 0

    def recall(self, entries: Any, *given: Any) -> Recalled:
        type(self).reads += 1
        return super().recall(entries[: 1 + self.reads % 2], *given)


class CallsForEver(Triples):
    name, most_calls = "for-ever", 10**6


MUTANTS = {
    LeaksAfterForget: "test_a_forgotten_source_leaves_no_trace",
    MixesStreams: "test_streams_that_are_written_and_read_together_are_as_alone",
    IsNeverEmpty: "test_an_empty_memory_leaves_the_decoder_as_it_is",
    TakesTooMuch: "test_recalled_text_fits_and_says_what_it_is_made_of",
    CountsReads: "test_tokens_with_a_cache_are_as_in_one_forward",
    CallsForEver: "test_calls_come_to_an_end",
}


def suite_of(mutant: type[TextMechanism]) -> Any:
    found: dict[str, Any] = {"implementation": mutant}
    if issubclass(mutant, Triples):
        found["text"] = lambda self, seed: f"name{seed}|office|room {seed}"
    return type("Suite", (TextMechanismConformance,), found)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_seen(mutant: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = suite_of(mutant)
    test = getattr(suite(), MUTANTS[mutant])
    given = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    named = {name: given[name] for name in inspect.signature(test).parameters if name in given}
    with suite.wrapped() as model, pytest.raises(AssertionError):
        test(model, **named)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_the_mutation_that_is_seen(mutant: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the mutant derives from passes the same test."""
    suite = suite_of(mutant.__mro__[1])
    test = getattr(suite(), MUTANTS[mutant])
    given = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    named = {name: given[name] for name in inspect.signature(test).parameters if name in given}
    with suite.wrapped() as model:
        test(model, **named)
