"""Writes that have an id are made once, whatever comes between."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import InputError, MemoryFileError, MemoryMismatchError, NonFiniteError
from mplus.memory import Memory
from mplus.memory.format.offline import forget_saved
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.memory.sources.writes import WriteLog, WriteRecord
from mplus.memory.transaction import Streams
from mplus.memory.writing.change import ChunkChange
from mplus.memory.writing.write import write_together
from tests.helpers.clock import noon
from tests.memory.disks.disks import Failing, open_memory
from tests.memory.disks.plain import PlainModel, chunk
from tests.memory.tiny import assert_content, assert_same, content, difference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL, SHORT = PlainModel(), PlainModel(min_chunk_tokens=4)
TEXTS = [torch.cat([chunk(number) for number in numbers]) for numbers in ((0, 1, 2, 3, 4), (10, 11, 12))]
COUNTS = ("tokens", "chunks", "dropped_rows", "evicted_rows")


def filled(memory: Memory) -> Memory:
    memory.write([chunk(40), chunk(41)], source="before")
    return memory


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    """A content, but for how long its writes took."""
    logs = {name: value for name, value in found.items() if name.endswith(".writes")}
    return {**found, **{name: [evolve(record, seconds=0.0) for record in log] for name, log in logs.items()}}


def assert_alike(one: Memory, other: Memory) -> None:
    assert difference(timeless(content(one)), timeless(content(other))) == []


def expected_with(**options: Any) -> tuple[Memory, Any]:
    memory = filled(MODEL.new_memory(2))
    return memory, memory.write(TEXTS, source="a", **options)


@pytest.mark.parametrize("live", [False, True])
def test_the_same_again_changes_nothing(tmp_path: Path, live: bool) -> None:
    memory = filled(Memory.open(tmp_path / "live", MODEL, batch_size=2) if live else MODEL.new_memory(2))
    plain, report = expected_with()
    first = memory.write(TEXTS, source="a", write_id="w")
    assert [getattr(first, name) for name in COUNTS] == [getattr(report, name) for name in COUNTS]
    before, version = content(memory), memory.version
    assert memory.write(TEXTS, source="a", write_id="w") == first
    assert memory.version == version
    if live:
        memory = Memory.open(tmp_path / "live", MODEL, read_only=True)
    assert_content(memory, before)
    without = {name: value for name, value in before.items() if not name.endswith(".writes")}
    assert difference(without, {name: v for name, v in content(plain).items() if not name.endswith(".writes")}) == []
    if live:
        return
    for wrong, source in ((TEXTS[::-1], "a"), ([TEXTS[0], TEXTS[0]], "a"), (TEXTS, "b")):
        with pytest.raises(InputError, match="write_id 'w' was given to another text"):
            memory.write(wrong, source=source, write_id="w")
    for wrong_id in ("", 7):
        with pytest.raises(InputError, match="write_id must be a text"):
            memory.write(TEXTS, write_id=wrong_id)
    assert_content(memory, before)
    memory.write(TEXTS, source="a", write_id="another")
    assert [len(state.writes) for state in memory.states] == [2, 2]


@pytest.mark.parametrize("error", [NonFiniteError("NaN"), KeyboardInterrupt(), MemoryError()])
def test_it_goes_on_at_the_next_chunk(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, report = expected_with(write_id="w")
    memory, apply = filled(MODEL.new_memory(2)), ChunkChange.make
    for struck in (1, 0, 2):
        calls = iter(range(99))

        def failing(*arguments: object, calls: Any = calls, struck: int = struck) -> None:
            if next(calls) == struck:
                raise error
            apply(*arguments)

        monkeypatch.setattr(ChunkChange, "make", failing)
        with pytest.raises(type(error)):
            memory.write(TEXTS, source="a", write_id="w")
        with pytest.raises(InputError, match="another text"):
            memory.write([chunk(1), chunk(1)], source="a", write_id="w")
    monkeypatch.setattr(ChunkChange, "make", apply)
    assert [record.chunks for state in memory.states for record in state.writes] == [3, 3]
    memory = memory.fork()
    found = memory.write(TEXTS, source="a", write_id="w")
    assert [getattr(found, name) for name in COUNTS] == [getattr(report, name) for name in COUNTS]
    assert_alike(memory, expected)


@pytest.mark.parametrize("atomic", [False, True])
def test_a_killed_process(tmp_path: Path, atomic: bool) -> None:
    """Killed before call after call of the file system; then the same write is made again."""
    expected, _ = expected_with(write_id="w")
    with Memory.open(tmp_path / "spare", MODEL, batch_size=2, clock=noon) as memory:
        filled(memory)
    kills = begun = 0
    for at in range(3 if atomic else 9, 60, 6):
        path = tmp_path / f"{at}"
        os.system(f"cp -r {tmp_path / 'spare'} {path}")
        if not killed(lambda path=path, at=at: open_and_write(path, at, atomic)):
            break
        kills += 1
        with Memory.open(path, MODEL, clock=noon) as memory:
            (record,) = list(memory.states[0].writes) or [None]
            begun += record is not None and not record.is_finished
            assert not atomic or record is None or record.is_finished, "all or nothing"
            memory.write(TEXTS, source="a", write_id="w", atomic=atomic)
            assert_alike(memory, expected)
            assert_same(Memory.open(path, MODEL, read_only=True), memory)
        assert verify(path) == []
    assert kills > 0
    assert atomic or begun > 0


def open_and_write(path: Path, at: int, atomic: bool) -> None:
    from tests.memory.disks.disks import Deadly

    memory = open_memory(path, MODEL, files=Deadly(at))
    memory.write(TEXTS, source="a", write_id="w", atomic=atomic)


def killed(work: Callable[[], None]) -> bool:
    """Whether a child that does this is killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_full_disk(tmp_path: Path) -> None:
    files = Failing()
    memory = filled(open_memory(tmp_path / "live", MODEL, batch_size=2, files=files))
    expected, _ = expected_with(write_id="w")
    files.fail(5, lasting=False, late=False)
    with pytest.raises(MemoryFileError):
        memory.write(TEXTS, source="a", write_id="w")
    files.heal()
    memory.write(TEXTS, source="a", write_id="w")
    assert_alike(memory, expected)


def test_ids_live_and_go_with_their_source(tmp_path: Path) -> None:
    with Memory.open(tmp_path / "live", MODEL, batch_size=2, keep_text=True, clock=noon) as memory:
        memory.write(TEXTS, source="a", write_id="secret id")
        memory.write([chunk(3), None], source="b", write_id="b")
        memory.save(tmp_path / "saved")
        for number in range(30):
            memory.write([chunk(number)] * 2, source="c")  # of a, no row is left
        memory.checkpoint()
        memory.write(TEXTS, source="a", write_id="secret id")
        assert [record.chunks for record in memory.states[1].writes] == [3]
        rebuilt = memory.fork()
        rebuilt.forget("a", mode="rebuild")
        assert [record.write_id for record in rebuilt.states[0].writes] == ["b"]
        memory.forget("a")
    loaded = Memory.load(tmp_path / "saved", MODEL)
    assert [[record.write_id for record in state.writes] for state in loaded.states] == [
        ["secret id", "b"],
        ["secret id"],
    ]
    forget_saved(tmp_path / "saved", "a")
    for folder in ("live", "saved"):
        assert verify(tmp_path / folder) == []
        assert not any(b"secret id" in file.read_bytes() for file in (tmp_path / folder).iterdir())
    again = Memory.open(tmp_path / "live", MODEL)
    assert again.write(TEXTS, source="a", write_id="secret id").chunks == [5, 3], "nobody knows it any more"


@pytest.mark.parametrize("live", [False, True])
def test_damaged_ids_are_found_and_cost_nothing_else(tmp_path: Path, live: bool) -> None:
    with Memory.open(tmp_path / "live", MODEL, batch_size=2) as memory:
        filled(memory).write(TEXTS, source="a", write_id="w")
        memory.save(tmp_path / "saved")
    folder, digest = tmp_path / ("live" if live else "saved"), memory.states[0].writes.records["w"].digest
    (path,) = [file for file in folder.iterdir() if digest in file.read_bytes()]
    data = path.read_bytes()
    path.write_bytes(data.replace(digest, bytes(32)))
    assert any("writes" in fault for fault in verify(folder))
    lost = repair(folder, tmp_path / "repaired")
    assert len(lost) == 1
    assert "stream.0.writes: which writes had what id" in lost[0]
    repaired = Memory.load(tmp_path / "repaired", MODEL)
    assert [len(state.writes) for state in repaired.states] == [0, 1]
    assert difference(content(repaired), content(memory)) == ["0.writes"]


TEXT_LENGTHS = st.lists(st.tuples(st.integers(1, 21), st.sampled_from("ab")), min_size=1, max_size=6)


@given(TEXT_LENGTHS, st.integers(0, 12))
def test_a_program_that_is_started_again_writes_what_is_missing(texts: list[tuple[int, str]], at: int) -> None:
    """Short texts wait for more, and what waits comes into chunks of later ones: nothing is counted twice."""

    def run(memory: Memory) -> Memory:
        for number, (length, source) in enumerate(texts):
            report = memory.write(torch.arange(number, number + length) % 100, source=source, write_id=f"{number}")
            assert report.tokens == [length]
        return memory

    expected, change, calls = run(SHORT.new_memory()), Streams.change, iter(range(99))

    def interrupted(self: Streams, *arguments: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return change(self, *arguments)

    memory = SHORT.new_memory()
    with patch.object(Streams, "change", interrupted), suppress(KeyboardInterrupt):
        run(memory)
    assert_alike(run(memory), expected)
    assert [source.tokens for source in memory.sources()] == [source.tokens for source in expected.sources()]


def test_another_size_of_chunks_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, apply, calls = MODEL.new_memory(2), ChunkChange.make, iter(range(9))

    def failing(*arguments: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        apply(*arguments)

    monkeypatch.setattr(ChunkChange, "make", failing)
    with pytest.raises(KeyboardInterrupt):
        memory.write(TEXTS, source="a", write_id="w")
    memory.save(tmp_path)
    memory = Memory.load(tmp_path, PlainModel(chunk_tokens=12))
    report = memory.write(TEXTS, source="a", write_id="w")
    assert (report.tokens, report.chunks) == ([40, 24], [1 + 3, 1 + 2])


RECORDS = st.builds(
    WriteRecord,
    write_id=st.text(min_size=1, max_size=3),
    source=st.integers(0, 3),
    digest=st.binary(min_size=32, max_size=32),
    total=st.just(9),
    tokens=st.integers(0, 9),
    chunks=st.integers(0, 9),
    seconds=st.floats(0, 9),
)


@given(st.lists(RECORDS, max_size=4), st.lists(RECORDS, max_size=4))
def test_a_log_from_a_file_and_back(records: list[WriteRecord], more: list[WriteRecord]) -> None:
    log = WriteLog().noting(records)
    assert WriteLog.from_tensors(log.tensors(), torch.arange(4)) == log
    later = log.noting(more).without(0)
    changed, gone = later.changed_since(log)
    assert log.lacking(gone).noting(changed).records == later.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("total"), "must have the columns"),
        (lambda c: c.update(total=c["total"][:1]), r"writes.total must be torch.int64 \[n\]"),
        (lambda c: c.update(total=c["total"] - 9), "writes.total must be from 0"),
        (lambda c: c.update(tokens=c["total"] + 1), "at most writes.total"),
        (lambda c: c.update(source=c["source"] + 4), "must be sources of the stream"),
        (lambda c: c.update(digest=c["digest"][:40]), "32 bytes for each of 2"),
        (lambda c: c.update(seconds=-c["seconds"] - 1), "finite, and at least 0"),
        (lambda c: c.update(id_length=torch.tensor([2, 1])), "add up to 2 bytes"),
        (lambda c: c.update(id=torch.tensor([65, 65], dtype=torch.uint8)), "texts that differ, got 'A'"),
        (lambda c: c.update(id_length=torch.tensor([-1, 2])), "texts that differ, got None"),
    ],
)
def test_logs_that_make_no_sense(change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    record = WriteRecord(write_id="A", source=0, digest=bytes(32), total=3)
    columns = WriteLog().noting([record, attrs.evolve(record, write_id="B")]).tensors()
    change(columns)
    with pytest.raises(MemoryMismatchError, match=message):
        WriteLog.from_tensors(columns, torch.arange(1))


# ---------------------------------------------------------------------- in pieces, and several memories together

PIECES = list(TEXTS[0].split(7))


def in_pieces(memory: Memory, **options: Any) -> Any:
    return memory.write_pieces(iter(PIECES), source="a", **options)


def failing_at(monkeypatch: pytest.MonkeyPatch, struck: int, error: BaseException) -> None:
    """Let ``error`` strike in the place of a chunk; -1: in that of none."""
    monkeypatch.undo()
    calls, apply = iter(range(99)), ChunkChange.make

    def applied(*arguments: Any) -> None:
        if next(calls) == struck:
            raise error
        apply(*arguments)

    monkeypatch.setattr(ChunkChange, "make", applied)


@pytest.mark.parametrize("atomic", [False, True])
def test_pieces_are_written_once_too(atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, memory = MODEL.new_memory(1), MODEL.new_memory(1)
    report = expected.write(TEXTS[0], source="a", write_id="w")
    failing_at(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        in_pieces(memory, write_id="w", atomic=atomic)
    assert [record.chunks for record in memory.states[0].writes] == ([] if atomic else [2])
    failing_at(monkeypatch, -1, KeyboardInterrupt())
    first = in_pieces(memory, write_id="w", atomic=atomic)
    assert [getattr(first, name) for name in COUNTS] == [getattr(report, name) for name in COUNTS]
    assert_alike(memory, expected)
    before = content(memory)
    assert in_pieces(memory, write_id="w") == first == memory.write(TEXTS[0], source="a", write_id="w")
    with pytest.raises(InputError, match="write_id 'w' was given to another text"):
        memory.write_pieces(iter(PIECES[:-1]), source="a", write_id="w")
    assert_content(memory, before)


@pytest.mark.parametrize("atomic", [False, True])
def test_memories_that_are_written_together_are_written_once_too(
    tmp_path: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, ids = [TEXTS[0], TEXTS[0].flip(0), TEXTS[1]], ["v", "w", None]
    expected = [MODEL.new_memory(1) for _ in texts]
    reports = [one.write(text, source="a", write_id=name) for one, text, name in zip(expected, texts, ids, strict=True)]
    live = Memory.open(tmp_path / "live", MODEL, batch_size=1)
    memories = [MODEL.new_memory(1), live, MODEL.new_memory(1)]
    given: dict[str, Any] = {"sources": ["a"] * 3, "write_ids": ids, "atomic": atomic}
    failing_at(monkeypatch, 4, NonFiniteError("NaN"))  # the second chunk of the second memory
    found = write_together(memories, texts, **given, errors="return")
    assert isinstance(found[1], NonFiniteError)
    assert found[0].chunks == reports[0].chunks
    assert [[record.chunks for record in one.states[0].writes] for one in memories] == [[5], [] if atomic else [1], []]
    failing_at(monkeypatch, 99, KeyboardInterrupt())
    again = [write_together(memories[:2], texts[:2], ["a"] * 2, write_ids=ids[:2], atomic=atomic) for _ in range(2)]
    assert again[0] == again[1], "once"
    assert [[getattr(one, name) for name in COUNTS] for one in again[0]] == [
        [getattr(one, name) for name in COUNTS] for one in reports[:2]
    ]
    for memory, wanted in zip(memories, expected, strict=True):
        assert_alike(memory.fork(), wanted)
    assert_same(Memory.open(tmp_path / "live", MODEL, read_only=True), live)
    wrong = write_together(memories[:2], texts[1::-1], ["a"] * 2, write_ids=["v", "new"], errors="return")
    assert isinstance(wrong[0], InputError)
    assert wrong[1].chunks == [5], "what is refused does not keep the others"
    with pytest.raises(InputError, match="write_ids must be one id or None for each of 3 memories, got 'abc'"):
        write_together(memories, texts, write_ids="abc")
