"""Files that lie under right checksums end as an error that names them, never as a raw one, and stay as they are."""

from __future__ import annotations

import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.errors import MemoryFileError, MPlusError
from mplus.memory import Memory
from mplus.memory.format.manifest import is_memory
from tests.helpers.modes import on_every_change
from tests.memory import tiny
from tests.memory.disks import forging, mutating
from tests.memory.disks.forging import do_everything
from tests.memory.disks.plain import PlainModel, chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

MODEL = PlainModel(
    mechanism={"name": "mplus", "merge_every": 2}, long_term_tokens=32, retrieved_tokens=6, eviction="lru"
)


@pytest.fixture(autouse=True, scope="module")
def no_waiting() -> Iterator[None]:
    """Nobody pulls the plug here: not waiting for the disk saves minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two streams: files of rows with some removed, kept texts, times of reads, pending rows and three records."""
    folder = tmp_path_factory.mktemp("live") / "memory"
    memory = Memory.open(folder, MODEL, batch_size=2, keep_text=True)
    for number in range(10):
        memory.write([chunk(number), chunk(number + 1)], source="ab"[number % 2])
        if number == 5:
            forging.read(memory)
        if number in {4, 7, 9}:
            memory.checkpoint()
    for number in range(3):
        memory.write([chunk(number), chunk(number + 5)], source="cd"[number % 2])
    memory.directory.close()  # as if it had been killed
    return folder


@pytest.fixture(scope="module")
def saved(live: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same memory, saved."""
    folder = tmp_path_factory.mktemp("saved") / "memory"
    Memory.open(live, MODEL, read_only=True).save(folder)
    return folder


@pytest.mark.parametrize("kind", ["live", "saved"])
def test_what_is_done_works_where_nothing_is_forged(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "memory")
    found = do_everything(folder, MODEL, tmp_path)
    assert (found.raw, found.refused, found.faults) == ({}, {}, [])


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    """A change of plain data."""

    def change(plain: Any) -> None:
        for key in keys[:-1]:
            plain = plain[key]
        plain[keys[-1]] = value

    return change


def one(name: str, value: Any, at: int = 0) -> Callable[[forging.Tensors], None]:
    """A change of one number of a tensor."""

    def change(tensors: forging.Tensors) -> None:
        tensors[name].view(-1)[at] = value

    return change


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[forging.Tensors], None]:
    """A change of a whole tensor."""
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


INFINITY, HUGE = float("inf"), 10**400
MANIFESTS = {
    "clock is infinite": put("streams", 0, "clock", value=INFINITY),
    "clock is no number": put("streams", 0, "clock", value=float("nan")),
    "clock is true": put("streams", 0, "clock", value=True),
    "clock is a fraction": put("streams", 0, "clock", value=40.0),
    "clock is too large": put("streams", 0, "clock", value=2**63),
    "clock is negative": put("streams", 1, "clock", value=-1),
    "clock is before rows": put("streams", 1, "clock", value=3),
    "more digits than are read": put("streams", 0, "next_source", value=HUGE),
    "next source is one there is": put("streams", 0, "next_source", value=0),
    "more sources than there are": put("streams", 0, "sources", value=9),
    "store out of range": put("streams", 1, "store", value=7),
    "rows are negative": put("streams", 0, "rows", "stm", 1, value=-1),
    "another list of rows": put("streams", 0, "rows", "other", value=[0, 0, 0]),
    "layers": put("layout", "layers", value=2),
    "layers, far too many": put("layout", "layers", value=2**31 - 1),
    "width": put("layout", "hidden_size", value=2**31 - 1),
    "whole numbers as rows": put("layout", "dtype", value="int8"),
    "no hidden states": put("layout", "keeps_hidden", value=False),
    "rows made with something": put("fingerprint", "made_with", value={"sets": [], "streams": [0.0, 1]}),
    "a mechanism without name": put("fingerprint", "mechanism", value=[1]),
}


def in_turn(cases: Iterable[str], only_saved: Collection[str] = ()) -> list[tuple[str, str]]:
    """Every case in a directory and saved; on every change, one after the other in one of these."""
    found = []
    for place, case in enumerate(cases):
        kinds = ["saved"] if case in only_saved else ["live", "saved"]
        found += [(kind, case) for kind in on_every_change([kinds[place % len(kinds)]], nightly=kinds)]
    return found


@pytest.mark.parametrize(("kind", "what"), in_turn(MANIFESTS))
def test_a_manifest_that_lies_is_refused(kind: str, what: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "memory")
    forging.forge_manifest(folder, MANIFESTS[what])
    assert refused(folder, tmp_path).faults != []


def same_file_twice(plain: dict[str, Any]) -> None:
    files = plain["stores"][0]["files"]
    files.append(files[0])
    plain["streams"][0]["ltm"] = [2 * count for count in plain["streams"][0]["ltm"]]


OF_DIRECTORIES = {
    "the same file twice": same_file_twice,
    "files in another order": lambda plain: plain["stores"][0]["files"].reverse(),
    "next ids lower than there are": put("stores", 0, "next_ids", 1, value=1),
    "next ids of two layers": put("stores", 0, "next_ids", value=[90, 90]),
    "a file elsewhere": put("stores", 0, "files", 0, "file", value="../rows-00.safetensors"),
    "number of the checkpoint": put("number", value=1e9),
}


@pytest.mark.parametrize("what", OF_DIRECTORIES)
def test_a_manifest_of_a_directory_that_lies_is_refused(what: str, live: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(live, tmp_path / "memory")
    forging.forge_manifest(folder, OF_DIRECTORIES[what])
    assert refused(folder, tmp_path).faults != []


STREAMS = {
    "a source that there is not": one("stream.0.rows.stm.1.source", 77),
    "a source below none": one("stream.0.rows.stm.1.source", -2),
    "a birth after the clock": one("stream.1.rows.stm.0.birth", 2**45),
    "a birth long before the first": one("stream.0.rows.stm.0.birth", -(2**40)),
    "births as floats": replaced("stream.0.rows.stm.0.birth", torch.Tensor.float),
    "a row too few in a column": replaced("stream.0.rows.stm.0.hidden", lambda rows: rows[1:]),
    "rows of another width": replaced("stream.0.rows.stm.0.hidden", lambda rows: rows[:, 1:]),
    "rows of another dtype": replaced("stream.1.rows.pending.2.hidden", torch.Tensor.half),
    "no births": lambda tensors: tensors.pop("stream.0.rows.pending.1.birth"),
    "no keys of pending rows": lambda tensors: tensors.pop("stream.0.rows.pending.1.key"),
    "a column that is not one": lambda tensors: tensors.update(
        {"stream.0.rows.stm.0.expiry": tensors["stream.0.rows.stm.0.birth"].double()}
    ),
    "no counter": lambda tensors: tensors.pop("stream.0.state.counter.decayed"),
    "a counter of another shape": replaced("stream.0.state.counter.decayed", lambda counts: counts[1:]),
    "a counter of another dtype": replaced("stream.1.state.counter.writes_since_merge", torch.Tensor.float),
    "a counter that is not one": lambda tensors: tensors.update({"stream.0.state.counter.x": torch.zeros(1)}),
    "a tensor that is not one": lambda tensors: tensors.update({"stream.0.state.x": torch.zeros(1)}),
    "no state of a generator": replaced("stream.0.generator", torch.zeros_like),
    "half a state of a generator": replaced("stream.0.generator", lambda state: state[1:]),
    "no state of the texts' generator": replaced("stream.1.text.generator", torch.zeros_like),
    "a name that is no text": one("stream.0.sources.name", 255),
    "lengths of names": one("stream.0.sources.name_length", 2**62),
    "a source twice": one("stream.0.sources.number", 0, at=1),
    "sources of tokens below none": one("stream.1.sources.tokens", -1),
    "sources without chunks": lambda tensors: tensors.pop("stream.0.sources.chunks"),
    "a text of a source that there is not": one("stream.0.text.sources", 50),
    "a text of ids below none": one("stream.0.text.ids", -1),
    "a text of ids out of the vocabulary": one("stream.0.text.ids", 100),
    "a turn twice": one("stream.0.text.turns", 0, at=1),
    "turns to the end of numbers": one("stream.0.text.turns", 2**63 - 1, at=-1),
    "lengths of texts": one("stream.0.text.lengths", 2**40),
    "times of reads": one("stream.0.usage.0", 2**63 - 1),
    "too few times of reads": replaced("stream.0.usage.0", lambda times: times[1:]),
}


REPLACED = {"no keys of pending rows", "a counter of another dtype", "a counter that is not one"}
"""By the records in the journal."""
NEEDS_A_DECODER = {
    "no keys of pending rows", "no counter", "a counter of another shape", "a counter of another dtype",
    "a counter that is not one", "a text of ids out of the vocabulary",
}  # fmt: skip
"""Whoever has only the files cannot know what its mechanism keeps."""


@pytest.mark.parametrize(("kind", "what"), in_turn(STREAMS, REPLACED))
def test_a_stream_that_lies_is_refused(kind: str, what: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "memory")
    forge = forging.forge_state if kind == "live" else forging.forge_data
    forge(folder, STREAMS[what])
    found = refused(folder, tmp_path)
    if what not in NEEDS_A_DECODER:
        assert found.faults != []


def test_what_the_journal_replaces_can_be_anything_of_its_form(live: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(live, tmp_path / "memory")
    forging.forge_state(folder, STREAMS["a counter that is not one"])
    found = do_everything(folder, MODEL, tmp_path)
    assert (found.raw, found.refused, found.faults) == ({}, {}, [])


LONG_TERM = {
    "a source that there never was": one("1.source", 2**40),
    "a source below none": one("1.source", -2),
    "a birth after the clock": one("1.birth", 2**40),
    "a birth long before the first": one("1.birth", -(2**40)),
    "an id twice": replaced("1.id", lambda ids: ids[:1].expand(len(ids))),
    "ids from the last to the first": replaced("1.id", lambda ids: ids.flip(0)),
    "an id after the next": one("1.id", 2**62, at=-1),
    "ids that do not ascend": replaced("1.id", lambda ids: ids[[0, 2, 1, *range(3, len(ids))]]),
}


@pytest.mark.parametrize("what", LONG_TERM)
def test_long_term_rows_that_lie_are_refused_when_they_are_read(what: str, live: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(live, tmp_path / "memory")
    forging.forge_rows(folder, LONG_TERM[what])
    found = do_everything(folder, MODEL, tmp_path)
    assert found.raw == {}
    assert found.faults != []
    error = found.refused.get("open", found.refused.get("read"))
    assert isinstance(error, MemoryFileError)
    assert "1." in str(error)
    assert "repair" not in found.refused
    assert "read repaired" not in found.refused


SAVED_ROWS = {
    "a source that there is not": one("store.0.1.source", 77),
    "a birth after the clock": one("store.0.1.birth", 2**40),
    "a birth long before the first": one("store.1.1.birth", -(2**40)),
    "keys of another width": replaced("store.0.1.key", lambda keys: keys[:, 1:]),
    "a row too few in a column": replaced("store.0.1.source", lambda rows: rows[1:]),
}


@pytest.mark.parametrize("what", SAVED_ROWS)
def test_saved_long_term_rows_that_lie_are_refused(what: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "memory")
    forging.forge_data(folder, SAVED_ROWS[what])
    assert refused(folder, tmp_path).faults != []


def fact(*keys: Any, value: Any) -> Callable[[forging.Tensors, Any], None]:
    return lambda _, facts: put(*keys, value=value)(facts)


RECORDS: dict[str, Callable[[forging.Tensors, Any], object]] = {
    "clock is infinite": fact("0", "clock", value=INFINITY),
    "clock goes back": fact("0", "clock", value=1),
    "clock is a text": fact("0", "clock", value="\ud800"),
    "next source goes back": fact("0", "next_source", value=0),
    "next source is too large": fact("0", "next_source", value=2**63),
    "sources that leave": fact("0", "gone", value=[0.5]),
    "tensors that there are not": fact("0", "tensors", value=["counter.x"]),
    "what grew that there is not": fact("0", "grown", value={"counter.x": 1}),
    "what grew is no name": fact("0", "grown", value=[5]),
    "no counters": fact("0", "tensors", value=[]),
    "texts that there are not": fact("0", "texts", value=10**6),
    "a layer out of range": fact("0", "store", 0, 1, value=3),
    "a layer that counts back": fact("0", "store", 0, 1, value=-1),
    "a change that is none": fact("0", "store", 0, 0, value="exchange"),
    "a stream out of range": lambda _, facts: facts.update({"2": facts.pop("1")}),
    "a stream that counts back": lambda _, facts: facts.update({"-1": facts.pop("1")}),
    "places out of range": lambda tensors, _: one("0.rows.stm.0.stay", 99, at=-1)(tensors),
    "places twice": lambda tensors, _: one("0.rows.stm.0.stay", 2**40)(tensors),
    "ids that there are": lambda tensors, _: tensors["0.store.0.ids"].sub_(5),
    "ids to the end of numbers": lambda tensors, _: one("0.store.0.ids", 2**63 - 1, at=-1)(tensors),
    "fewer ids than rows": lambda tensors, _: replaced("0.store.0.ids", lambda ids: ids[1:])(tensors),
    "a generator": lambda tensors, _: replaced("0.generator", lambda state: state[2:])(tensors),
    "a source of a row": lambda tensors, _: one("0.rows.stm.1.source", 40)(tensors),
    "a birth of a row": lambda tensors, _: one("0.rows.stm.1.birth", 2**41)(tensors),
    "rows of another width": lambda tensors, _: replaced("0.rows.stm.1.hidden", lambda rows: rows[:, 1:])(tensors),
    "the name of a source": lambda tensors, _: replaced("0.sources.name", lambda name: name | 128)(tensors),
    "a turn of a text": lambda tensors, _: one("0.text.turns", 0)(tensors),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_lies_is_refused(what: str, live: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(live, tmp_path / "memory")
    number = next(
        number
        for number, payload in enumerate(forging.journal_of(folder))
        if b"0.store.0.ids" in payload and b"0.sources.name" in payload
    )
    forging.forge_record(folder, number, RECORDS[what])
    assert refused(folder, tmp_path).faults != []


JOURNALS: dict[str, Callable[[list[bytes]], object]] = {
    "a record twice": lambda payloads: payloads.insert(1, payloads[1]),
    "no payload": lambda payloads: payloads.insert(1, b""),
    "no safetensors": lambda payloads: payloads.insert(1, b"\xff" * 600),
    "facts of many levels": lambda payloads: payloads.insert(1, deep()),
}


def deep() -> bytes:
    pieces = forging.pack({"0.generator": torch.zeros(1)}, {"change": "[" * 100_000 + "]" * 100_000})
    return b"".join(bytes(piece) for piece in pieces)


@pytest.mark.parametrize("what", JOURNALS)
def test_a_journal_that_lies_is_refused(what: str, live: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(live, tmp_path / "memory")
    forging.forge_payloads(folder, JOURNALS[what])
    assert refused(folder, tmp_path).faults != []


def refused(folder: Path, scratch: Path) -> forging.Outcome:
    """Opening ends with an error that names the folder, and nothing with a raw one."""
    found = do_everything(folder, MODEL, scratch)
    assert found.raw == {}
    assert isinstance(found.refused.get("open"), MemoryFileError)
    assert str(folder) in str(found.refused["open"])
    assert isinstance(found.refused.get("import"), MPlusError) or not is_memory(folder)
    return found


NEWEST = {
    "more than there are rows": replaced("stream.0.state.newest.1", lambda rows: torch.cat([rows] * 9)),
    "of another width": replaced("stream.0.state.newest.1", lambda rows: rows[:, 1:]),
    "of another dtype": replaced("stream.0.state.newest.1", torch.Tensor.double),
    "not there": lambda tensors: tensors.pop("stream.0.state.newest.1"),
}


@pytest.mark.parametrize("what", NEWEST)
def test_hidden_states_for_the_next_write_that_lie_are_refused(what: str, tmp_path: Path) -> None:
    """Of a real decoder, whose rows are keys and values."""
    model = tiny.variant("paper")
    memory = model.new_memory(memory_rows="projected")
    memory.write(tiny.ids(100), source="a")
    memory.save(tmp_path / "memory")
    forging.forge_data(tmp_path / "memory", NEWEST[what])
    found = do_everything(tmp_path / "memory", model, tmp_path)
    assert found.raw == {}
    assert isinstance(found.refused.get("open"), MemoryFileError)
    assert found.faults != []
    assert "read repaired" not in found.refused
    assert "load repaired" not in found.refused


@pytest.mark.parametrize("seed", range(on_every_change(12, nightly=2000)))
def test_any_forgery_ends_well(seed: int, live: Path, saved: Path, tmp_path: Path) -> None:
    draw = random.Random(seed)
    folder = shutil.copytree(draw.choice([live, saved]), tmp_path / "memory")
    what = mutating.forge_anything(folder, draw)
    found = do_everything(folder, MODEL, tmp_path)
    assert found.raw == {}, what
