"""The table of sources: numbers are given once, tables share pages, and names of a file are read when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import MemoryMismatchError
from mplus.memory.sources import table as sources
from mplus.memory.sources.clock import FIRST, LAST
from mplus.memory.sources.source import Source
from mplus.memory.sources.table import PAGE, SourceTable

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = st.one_of(st.none(), st.text(st.characters(exclude_categories=[]), max_size=3), st.sampled_from("abcdef"))
TIMES = st.one_of(st.none(), st.floats(FIRST, LAST))
FACTS = st.builds(
    Source,
    NAMES,
    st.integers(0, 9),
    st.integers(0, 9),
    TIMES,
    TIMES,
    st.booleans(),
    st.one_of(st.none(), st.text()),
    TIMES,
)


def again(table: SourceTable) -> SourceTable:
    """From a file and back."""
    return SourceTable.from_tensors(table.tensors(), table.next_number)


@given(st.lists(FACTS, max_size=2 * PAGE + 3), st.sets(st.integers(0, 3 * PAGE)))
def test_what_is_written_to_a_file_is_read_from_it(entries: list[Source], gone: set[int]) -> None:
    table = SourceTable.of(dict(enumerate(entries)), 3 * PAGE).without(gone)
    found = again(table)
    assert found == table
    assert dict(found.items()) == {number: entry for number, entry in enumerate(entries) if number not in gone}
    assert found.tensors().keys() == table.tensors().keys()
    assert all(
        torch.equal(value.nan_to_num(), found.tensors()[name].nan_to_num()) for name, value in table.tensors().items()
    )


@given(st.lists(st.tuples(st.sampled_from(["write", "drop", "read", "fork"]), st.integers(0, 200)), max_size=60))
def test_it_is_a_dictionary_whose_numbers_are_given_once(steps: list[tuple[str, int]]) -> None:
    table, expected, given_before = SourceTable(), dict[int, Source](), set[int]()
    forks: list[tuple[SourceTable, dict[int, Source]]] = []
    for what, which in steps:
        if what == "write":
            name = f"source {which % 7}"
            known = [number for number, entry in expected.items() if entry.name == name]
            table, number = table.written(name, 3)
            if known:
                assert number == known[0]
            else:
                assert number not in given_before
            given_before.add(number)
            entry = expected.get(number, Source(name))
            expected = {**expected, number: Source(name, entry.tokens + 3, entry.chunks + 1)}
        elif what == "drop" and expected:
            number = sorted(expected)[which % len(expected)]
            table, expected = table.without([number]), {n: entry for n, entry in expected.items() if n != number}
        elif what == "read":
            table = again(table)
        elif what == "fork":
            other, _ = table.written(f"elsewhere {which}", 1)  # takes the number that this one gives next
            forks += [(table, expected), (other, dict(other.items()))]
        assert dict(table.items()) == expected
        assert [table.find(f"source {n}") for n in range(7)] == [
            next((n for n, entry in expected.items() if entry.name == f"source {name}"), None) for name in range(7)
        ]
    for fork, held in forks:
        assert dict(fork.items()) == held


def test_one_write_copies_one_page() -> None:
    table = SourceTable.of({number: Source(f"source {number}", 1, 1) for number in range(1500)})
    for name in ("source 700", "new"):
        later, _ = table.written(name, 5)
        shared = {id(page) for page in table.pages} & {id(page) for page in later.pages}
        assert len(shared) >= len(table.pages) - 1
        changed, gone = later.changed_since(table)
        assert ([entry.name for entry in changed.values()], gone) == ([name], [])


def test_nothing_is_decoded_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SourceTable.of({number: Source(f"source {number}", 1, 1) for number in range(1500)})
    calls: list[int] = []
    decode = sources.decoded
    monkeypatch.setattr(sources, "decoded", lambda columns: (calls.append(len(columns["number"])), decode(columns))[1])
    read = again(table)
    assert len(read) == 1500
    assert read.tensors().keys() == table.tensors().keys()
    assert read.column("number").tolist() == list(range(1500))
    assert calls == []
    assert read[3].name == "source 3"
    assert calls == [PAGE]
    assert read.find("source 1499") == 1499
    assert sum(calls) == 1500


def test_two_futures_give_one_name_two_numbers() -> None:
    table, _ = SourceTable().written("a", 1)
    one, other = table.written("b", 1)[0], table.written("c", 1)[0]
    one, other = one.written("c", 1)[0], other.written("b", 1)[0]
    assert [one.find(name) for name in "abc"] == [0, 1, 2]
    assert [other.find(name) for name in "abc"] == [0, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("tokens"), r"lack \['tokens'\]"),
        (lambda c: c.update(color=c["tokens"]), r"got \['color'\] too"),
        (lambda c: c.update(chunks=c["chunks"][:1]), r"sources.chunks must be torch.int64 \[n\]"),
        (lambda c: c.update(tokens=c["tokens"].float()), "got torch.float32"),
        (
            lambda c: c.update(tokens=c["tokens"] - 9),
            "sources.tokens must be from 0 to 4611686018427387904, got",
        ),
        (lambda c: c.update(number=c["number"].flip(0)), "must grow from 0 to below 2"),
        (lambda c: c.update(number=c["number"] + 1), "must grow from 0 to below 2"),
        (lambda c: c.update(number=c["number"] - 1), "must grow from 0 to below 2"),
        (lambda c: c.update(time=torch.tensor([torch.inf, 0], dtype=torch.float64)), "must be times in the years"),
        (lambda c: c.update(name_length=c["name_length"] + 1), "must add up to 3 bytes"),
        (lambda c: c.update(name_length=torch.tensor([-2, 5])), "must add up to 3 bytes"),
        (lambda c: c.update(name_length=torch.tensor([2, 1])), "must not divide characters"),
        (lambda c: c.update(name=torch.tensor([255, 255, 255], dtype=torch.uint8)), "must be UTF-8"),
        (lambda c: c.update(write_id=c["name"]), "lack .*write_id"),
    ],
)
def test_other_columns_are_refused(change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    columns = SourceTable.of({0: Source("a", 1, 1), 1: Source("é", 1, 1)}).tensors()
    change(columns)
    with pytest.raises(MemoryMismatchError, match=message):
        SourceTable.from_tensors(columns, 2)


def test_two_sources_of_one_name_are_refused() -> None:
    table = SourceTable.of({0: Source("a", 1, 1), 1: Source("a", 1, 1)})
    with pytest.raises(MemoryMismatchError, match="names of sources must differ, got 'a' twice"):
        table.find("b")


@given(st.lists(FACTS, max_size=PAGE + 3))
def test_marks_are_those_of_the_entries(entries: list[Source]) -> None:
    for table in (SourceTable.of(dict(enumerate(entries))), again(SourceTable.of(dict(enumerate(entries))))):
        assert table.earliest_expiry == min((e.expires for e in entries if e.expires is not None), default=None)
        assert table.pinned.tolist() == [number for number, entry in enumerate(entries) if entry.pinned]
