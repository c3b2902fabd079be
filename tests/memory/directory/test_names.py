"""Names of sources on disk: they cost nothing to open, and a forgotten one is in no file any more."""

from __future__ import annotations

import errno
import json
import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from mplus.cli import app
from mplus.errors import InputError, MemoryFileError
from mplus.memory import Memory
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.verify import verify
from mplus.memory.sources import table
from mplus.stores.disk.files import FileSystem
from tests.fixtures import make_live_v2
from tests.memory.disks.plain import CONFIGS, PlainModel, chunk, reopened
from tests.memory.tiny import content, difference

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["letter of Zaphod B.", "Zaphods Märchen 😀", 'Zaphod "\n\\', "Zaphod \ud800"]


def holding(folder: Path, name: str) -> list[str]:
    """Files in which a name stands, in any way in which one may be written."""
    ways = {name.encode("utf-8", "surrogatepass"), json.dumps(name)[1:-1].encode()}
    ways |= {json.dumps(name, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass")}
    ways |= {name.encode("utf-16-le", "surrogatepass")}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.name for path in files if any(way in path.read_bytes() for way in ways))


def written(path: Path, model: Any, name: str, **options: Any) -> Memory:
    """Two streams; ``name`` in checkpoint and journal, among others."""
    memory = Memory.open(path, model, batch_size=2, **options)
    memory.write([chunk(1), chunk(2)], source=["kept", name])
    memory.write([chunk(3), None], source=name)
    memory.checkpoint()
    for number in range(4, 8):
        memory.write([chunk(number), chunk(number + 4)], source=[name, "kept"])
    return memory


@pytest.mark.parametrize("name", NAMES)
def test_a_forgotten_name_is_in_no_file(tmp_path: Path, name: str) -> None:
    model = PlainModel()
    memory = written(tmp_path, model, name)
    assert [file.partition("-")[0] for file in holding(tmp_path, name)] == ["journal", "state"]
    memory.forget(name)
    assert holding(tmp_path, name) == []
    assert [source.name for source in memory.sources(0)] == ["kept"]
    assert difference(content(reopened(tmp_path, model)), content(memory)) == []
    memory.close()
    assert holding(tmp_path, name) == []
    assert verify(tmp_path) == []


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mode", ["drop", "rebuild"])
@pytest.mark.parametrize("keep_name", [False, True])
def test_in_every_store_and_mode(tmp_path: Path, config: str, mode: Any, keep_name: bool) -> None:
    name, model = NAMES[1], PlainModel(**CONFIGS[config])
    memory = written(tmp_path, model, name, keep_text=True)
    memory.forget(name, row=1, mode=mode)
    assert holding(tmp_path, name) != [], "the other stream has it"
    memory.forget(name, mode=mode, keep_name=keep_name)
    assert bool(holding(tmp_path, name)) == keep_name
    assert (memory.forgotten(0), memory.forgotten(1)) == ([name] * keep_name, [])
    again = reopened(tmp_path, model)
    assert difference(content(again), content(memory)) == []
    assert again.forgotten(0) == memory.forgotten(0)
    if keep_name:
        memory.forget("kept", mode=mode)
        assert memory.forgotten(0) == [name]
        memory.write([chunk(30), None], source=name)
        assert (memory.forgotten(0), [source.chunks for source in memory.sources(0)]) == ([], [1])
        memory.forget(name, keep_name=True)
        memory.forget(name)
        assert holding(tmp_path, name) == [], "a name that stood in the table alone"
        with pytest.raises(InputError, match="must be one of this memory's sources"):
            memory.forget(name)


def test_after_a_reset(tmp_path: Path) -> None:
    memory = written(tmp_path, PlainModel(), NAMES[1])
    memory.forget(NAMES[1], keep_name=True)
    memory.write(chunk(1).expand(2, -1), source=NAMES[0])
    memory.reset()
    assert holding(tmp_path, NAMES[0]) == holding(tmp_path, NAMES[1]) == []


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("keep_name", [False, True])
def test_from_the_command_line(tmp_path: Path, live: bool, keep_name: bool) -> None:
    from typer.testing import CliRunner

    name, model, folder = NAMES[1], PlainModel(), tmp_path / "memory"
    memory = written(folder, model, name, keep_text=True)
    memory.directory.close()  # without a last checkpoint: the journal has the name
    if not live:
        memory.save(tmp_path / "saved")
        folder = tmp_path / "saved"
    run = CliRunner().invoke(app, ["memory", "forget", str(folder), name, *["--keep-name"] * keep_name])
    assert run.exit_code == 0, run.output
    assert bool(holding(folder, name)) == keep_name
    assert [[source.name for source in stream] for stream in saved_sources(folder)] == [["kept"], ["kept"]]
    if keep_name:
        shown = CliRunner().invoke(app, ["memory", "show", str(folder)])
        assert "forgotten" in shown.output
        forget_saved(folder, name)
        assert holding(folder, name) == []
    assert verify(folder) == []


def test_a_directory_of_an_earlier_version(tmp_path: Path) -> None:
    """There, names of sources that had been forgotten stood in the manifest."""
    folder = shutil.copytree(make_live_v2.FOLDER, tmp_path / "old")
    assert "manifest.json" in holding(folder, "notes")
    forget_saved(folder, None)
    assert holding(folder, "notes") == []
    assert verify(folder) == []


def test_the_name_of_a_write_that_was_taken_back(tmp_path: Path) -> None:
    memory = Memory.open(tmp_path, PlainModel())
    memory.write(chunk(1), source="kept")

    def full(*given: Any) -> None:
        journal(*given)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert memory.directory is not None
    assert memory.directory.journal is not None
    journal, memory.directory.journal.append = memory.directory.journal.append, full  # type: ignore[method-assign]
    with pytest.raises(MemoryFileError, match="No space left"):
        memory.write(chunk(2), source=NAMES[1])
    memory.directory.journal.append = journal  # type: ignore[method-assign]
    memory.write(chunk(3), source="kept")
    memory.checkpoint()
    assert holding(tmp_path, NAMES[1]) == []
    assert [source.name for source in memory.sources()] == ["kept"]


@pytest.mark.parametrize("how", ["live", "apart", "saved"])
def test_a_file_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What was to be forgotten stands in it; the memory has forgotten all the same."""
    name, model, folder = NAMES[1], PlainModel(), tmp_path / "memory"
    memory = written(folder, model, name)
    if how == "apart":
        memory.directory.close()
    elif how == "saved":
        folder = tmp_path / "saved"
        memory.save(folder)
    remove = FileSystem.remove

    def refuse(files: FileSystem, path: Any) -> None:
        if path.name.startswith(("state", "rows")):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        remove(files, path)

    forget = memory.forget if how == "live" else partial(forget_saved, folder)
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "remove", refuse)
        with pytest.raises(MemoryFileError, match="could not be removed and may still"):
            forget(name)
    assert holding(folder, name) != []
    assert [[source.name for source in stream] for stream in saved_sources(folder)] == [["kept"], ["kept"]]
    if how == "live":
        memory.write(chunk(1).expand(2, -1), source="kept")
        memory.close()
        assert holding(folder, name) == [], "the next checkpoint removes it"


# ---------------------------------------------------------------------- many of them


def directory(path: Path, chunks: int, names: int) -> None:
    with Memory.open(path, PlainModel(long_term_tokens=None), keep_text=False) as memory:
        for number in range(chunks):
            memory.write(chunk(number), source=f"conversation {number % names}")


def test_many_names_are_not_read_when_a_directory_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory(tmp_path / "one", 150, 1)
    directory(tmp_path / "many", 150, 150)
    sizes = [len((tmp_path / name / "manifest.json").read_bytes()) for name in ("one", "many")]
    assert abs(sizes[0] - sizes[1]) <= 20, "numbers may have more digits"
    decoded: list[Any] = []
    decode = table.decoded
    monkeypatch.setattr(table, "decoded", lambda columns: (decoded.append(columns), decode(columns))[1])
    memory = reopened(tmp_path / "many", PlainModel(long_term_tokens=None))
    assert decoded == []
    assert [source.name for source in memory.sources()] == [f"conversation {number}" for number in range(150)]


def test_a_source_of_which_nothing_is_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    model = PlainModel()  # holds 10 short-term and 24 long-term rows, 4 a chunk
    memory = Memory.open(tmp_path / "live", model)
    for number in range(12):
        memory.write(chunk(number), source=f"conversation {number}")
    before = memory.sources()
    held = [source for source in before if any(source.held.values())]
    assert 5 < len(held) < len(before) == 12
    memory.save(tmp_path / "saved")
    assert memory.sources() == before, "a save changes nothing"
    assert Memory.load(tmp_path / "saved", model).sources() == held
    memory.checkpoint()
    assert memory.sources() == held
    assert holding(tmp_path / "live", before[0].name or "") == []
    memory.write(chunk(1), source=before[0].name)
    assert memory.states[0].sources.find(before[0].name) == 12, "its number is not given again"
    assert difference(content(reopened(tmp_path / "live", model)), content(memory)) == []


def test_texts_keep_their_source(tmp_path: Path) -> None:
    with Memory.open(tmp_path, PlainModel(), keep_text=True) as memory:
        for number in range(12):
            memory.write(chunk(number), source=f"conversation {number}")
        memory.checkpoint()
        assert len(memory.sources()) == 12
