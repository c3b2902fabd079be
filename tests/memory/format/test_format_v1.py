"""The memory of format version 1 that is kept with the tests is read as it was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from attrs import evolve

import mplus
from mplus.errors import MemoryMismatchError
from mplus.memory import SourceInfo
from mplus.memory.format.manifest import read_manifest
from mplus.memory.format.verify import verify
from tests.fixtures import make_memory_v1 as made
from tests.memory import tiny

BIRTHS = {  # layer 0
    "stm": [[-1, -3, -2, -1, -3, -2, -1], [-2, -1, -2, -2, -3, -2, -1], [-3, -2, -1]],
    "pending": [[73, 73, 72], [38, 36, 38], []],
    "ltm": [
        [45, 49, 51, 52, 53, 54, 56, 59, 57, 61, 60, 62, 63, 65, 64, 66, 68, 67, 69, 70, 71],
        [
            *[6, 6, 11, 10, 11, 13, 13, 14, 15, 15, 17, 18, 19, 20, 23],
            *[22, 23, 25, 24, 26, 28, 27, 28, 30, 30, 31, 33, 35, 33],
        ],
        [],
    ],
}
CONTENT = "acfe4fc4d19fd95e5d600006d23eb7f6ff6c2521a4849900fcfac9e3493ca3e5"


@pytest.fixture(scope="module")
def memory() -> mplus.Memory:
    return mplus.Memory.load(made.FOLDER, made.build_model())


def test_every_tensor_is_the_one_that_was_written(memory: mplus.Memory) -> None:
    tensors = [tensor for _, tensor in sorted(tiny.content(memory).items()) if isinstance(tensor, torch.Tensor)]
    assert hashlib.sha256(b"".join(map(tiny.raw, tensors))).hexdigest() == CONTENT


def test_every_row_is_where_it_was(memory: mplus.Memory) -> None:
    for row, (state, store) in enumerate(zip(memory.states, memory.stores, strict=True)):
        assert state.stm[0].birth.tolist() == BIRTHS["stm"][row]
        assert state.pending[0].birth.tolist() == BIRTHS["pending"][row]
        assert store.gather(0, store.ids(0)).birth.tolist() == BIRTHS["ltm"][row]
    assert [state.clock for state in memory.states] == [75, 39, 3]
    assert [int(state.counters["writes_since_merge"]) for state in memory.states] == [1, 1, 1]
    assert [state.counters["decayed"].tolist() for state in memory.states] == [[7, 7], [3, 3], [0, 0]]
    assert memory.sources(0) == [
        SourceInfo("Märchen", 90, 12, held(0, 0, 1.5), *ages(memory, 0, "Märchen")),
        SourceInfo(None, 71, 10, held(7, 3, 20), *ages(memory, 0, None)),
    ]
    assert memory.sources(1) == [
        SourceInfo("Märchen", 80, 11, held(7, 3, 23), *ages(memory, 1, "Märchen")),
        SourceInfo(None, 9, 2, held(0, 0, 6), *ages(memory, 1, None)),
    ]
    assert memory.sources(2) == [SourceInfo("notes", 5, 1, held(3, 0, 0), 0, 2, 0, 0)]


def held(short_term: float, pending: float, long_term: float) -> dict[str, float]:
    return {"short-term": short_term, "pending": pending, "long-term": long_term}


def ages(memory: mplus.Memory, row: int, name: str | None) -> list[int]:
    """Newest and oldest age of the rows of a source, in rows and in chunks of three, row by row."""
    state, store, found = memory.states[row], memory.stores[row], []
    number = state.sources.find(name)
    for layer in range(2):
        stored = store.gather(layer, store.ids(layer))
        for rows, start in ((state.stm[layer], 0), (state.pending[layer], state.clock), (stored, state.clock)):
            born = zip(rows.birth.tolist(), rows.source.tolist(), strict=True)
            found += [start - 1 - birth for birth, source in born if source == number]
    return [min(found), max(found), min(found) // 3, max(found) // 3]


def test_it_goes_on(memory: mplus.Memory) -> None:
    memory = memory.fork()
    model = made.build_model()
    text = made.text(6, 9).expand(3, -1)
    with torch.no_grad():
        moved = model(text, memory=mplus.Memory.load(made.FOLDER, model)).logits - model(text).logits
    assert moved.abs().amax((1, 2)).min() > 1
    report = memory.write([made.text(12, 10)] * 3, source="notes")
    assert report.chunks == [2, 2, 2]
    assert memory.sources(2)[0].tokens == 17


def test_it_was_made_when_there_was_one_score(tmp_path: Path) -> None:
    """The file does not name it, and is not read with another."""
    model = made.build_model()
    retriever = model.mplus.retriever
    retriever.options = evolve(retriever.options, score="mean_dot")
    with pytest.raises(
        MemoryMismatchError, match=r"but retriever\.score is 'sigmoid_mean' in the file and 'mean_dot' in the model$"
    ):
        mplus.Memory.load(made.FOLDER, model)
    made.write(made.build_model()).save(tmp_path)
    assert read_manifest(tmp_path).fingerprint["retriever.score"] == "sigmoid_mean"


def test_the_files_are_sound() -> None:
    assert verify(made.FOLDER) == []
    assert read_manifest(made.FOLDER).written_by == "0.1.0.dev0"


def test_the_script_keeps_what_is_there() -> None:
    before = {file.name: file.stat().st_mtime_ns for file in Path(made.FOLDER).iterdir()}
    with pytest.raises(SystemExit, match="exists and is kept"):
        made.main()
    assert {file.name: file.stat().st_mtime_ns for file in Path(made.FOLDER).iterdir()} == before
