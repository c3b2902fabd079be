"""Files that are gone, half made or known elsewhere, and what failed but came to be all the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from mplus.errors import ConfigError, LiveMemoryError, MemoryFileError, MPlusError
from mplus.memory import Memory
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.stores.disk.files import FileSystem
from tests.memory.disks.disks import Failing, Watched, open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.tiny import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MODEL = PlainModel()


def written(path: Path, chunks: int = 12, **options: Any) -> Memory:
    """With rows in every tier, in the files of a checkpoint and in the journal."""
    memory = open_memory(path, MODEL, **options)
    for number in range(chunks):
        memory.write(chunk(number), source="ab"[number % 2])
        if number == 9:
            memory.checkpoint()
    return memory


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("chunks", [1, 12])
def test_a_memory_without_its_manifest_is_not_taken_for_an_empty_folder(tmp_path: Path, chunks: int) -> None:
    memory = written(tmp_path / "memory", chunks)
    memory.directory.close()
    manifest = tmp_path / "memory" / "manifest.json"
    text = manifest.read_bytes()
    manifest.unlink()
    before = files_in(tmp_path / "memory")
    with pytest.raises(MemoryFileError, match="is missing, and without it"):
        Memory.open(tmp_path / "memory", MODEL)
    assert files_in(tmp_path / "memory") == before
    manifest.write_bytes(text)
    assert_same(reopened(tmp_path / "memory", MODEL), memory)


def test_a_crash_at_any_call_of_the_first_opening_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    class Dying(Watched):
        dies_at = 0

        def write_some(self, handle: int, data: memoryview) -> int:
            if self.calls + 1 == self.dies_at:
                os.write(handle, data[: len(data) // 2])
            return super().write_some(handle, data)

        def before(self, call: int, what: str) -> None:
            if self.dies_at and call >= self.dies_at:  # all that follows fails, too: nothing is cleaned up
                raise SystemExit

    for at in range(1, 40):
        files = Dying()
        files.dies_at = at
        try:
            open_memory(tmp_path / f"{at}", MODEL, files=files).directory.close()
        except SystemExit:
            with written(tmp_path / f"{at}", 1):
                pass
            assert len(files_in(tmp_path / f"{at}")) == 4, "manifest, state, journal and lock"
        else:
            assert at > 10
            return
    raise AssertionError("it never came to an end")


def test_a_number_in_a_file_called_lock_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("4711\n")
    with pytest.raises(MemoryFileError, match="must be empty or hold a memory"):
        Memory.open(tmp_path, MODEL)
    assert files_in(tmp_path) == {"lock": b"4711\n"}


@pytest.mark.parametrize("name", ["manifest.json", "state", "rows", "journal", "lock"])
def test_nothing_is_acknowledged_that_could_not_be_opened(tmp_path: Path, name: str) -> None:
    memory = written(tmp_path)
    for path in tmp_path.glob(f"{name}*"):
        path.unlink()
    left = files_in(tmp_path)
    for change in (lambda: memory.write(chunk(20)), memory.checkpoint, lambda: memory.forget("a"), memory.reset):
        with pytest.raises(LiveMemoryError, match="gone"):
            change()
    memory.close()
    assert files_in(tmp_path) == left


def test_a_journal_that_gets_a_second_name_is_not_written_to(tmp_path: Path) -> None:
    memory = written(tmp_path / "memory")
    (journal,) = (tmp_path / "memory").glob("journal*")
    os.link(journal, tmp_path / "copy")
    before = journal.read_bytes()
    with pytest.raises(LiveMemoryError, match="second name"):
        memory.write(chunk(20))
    assert (tmp_path / "copy").read_bytes() == before
    memory.directory.close()


@pytest.mark.parametrize("mode", [0, 0o400, 0o4600, 0o700, -1, True, "0600"])
def test_a_file_mode_is_checked(tmp_path: Path, mode: Any) -> None:
    for work in (
        lambda: Memory.open(tmp_path / "memory", MODEL, file_mode=mode),
        lambda: MODEL.new_memory().save(tmp_path / "memory", file_mode=mode),
    ):
        with pytest.raises(ConfigError, match="file_mode must be"):
            work()
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_impossible_paths(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    ways: list[Callable[[], object]] = [
        lambda: Memory.open(path, MODEL),
        lambda: Memory.open(path, MODEL, read_only=True),
        lambda: Memory.load(path, MODEL),
        lambda: MODEL.new_memory().save(path),
        lambda: saved_sources(path),
        lambda: forget_saved(path, "a"),
        lambda: repair(path, tmp_path / "out"),
    ]
    for work in ways:
        with pytest.raises(MPlusError):
            work()
    assert len(verify(path)) == 1


def test_an_interrupt_of_close_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    memory = written(tmp_path)
    memory.checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory.close()
    with pytest.raises(LiveMemoryError, match="was closed"):
        memory.write(chunk(20))
    written(tmp_path, 1).close()


def test_a_manifest_whose_rename_was_reported_as_failed_counts(tmp_path: Path) -> None:
    """What was found to be done, and could be synced, is no error of the change that did it."""

    class Renaming(Failing):
        late = True

        def after(self, call: int, what: str) -> None:
            if what == "rename" and self.at:
                self.heal()
                raise OSError(5, "Input/output error")

    files = Renaming()
    memory = written(tmp_path, files=files)
    files.at = 1
    assert memory.forget("b").chunks == 6
    assert files.at == 0, "it did fail"
    memory.write(chunk(20), source="c")
    memory.directory.close()
    assert verify(tmp_path) == []
    assert [source.name for source in reopened(tmp_path, MODEL).sources()] == ["a", "c"]


@pytest.mark.parametrize("seed", range(3))
def test_a_file_of_which_one_layer_has_lost_all_rows(tmp_path: Path, seed: int) -> None:
    """Each layer lets other rows go, so that a file may have rows of some layers only."""
    model = PlainModel(long_term_tokens=7, memory_tokens_per_chunk=2, short_term_tokens=5, eviction="reservoir")
    memory = Memory.open(tmp_path, model, seed=seed, journal_bytes=1)
    for number in range(25):
        memory.write(chunk(number)[:1], source="ab"[number % 2])
        assert_same(reopened(tmp_path, model), memory)
    memory.close()
    assert verify(tmp_path) == []
    assert repair(tmp_path, tmp_path / "out") == []
    assert_same(Memory.load(tmp_path / "out", model, store="mmap"), memory)


def test_forgetting_whose_removals_could_not_be_synced_says_what_has_come_to_be(tmp_path: Path) -> None:
    class Unsynced(Watched):
        fails = False

        def before(self, call: int, what: str) -> None:
            if what == "remove":
                self.fails = True
            elif what == "sync_folder" and self.fails:
                raise OSError(5, "Input/output error")

    files = Unsynced()
    memory = written(tmp_path, files=files)
    files.fails = False
    with pytest.raises(MemoryFileError, match="has forgotten what it was to forget, and its files are removed"):
        memory.forget("b")
    memory.directory.close()
    assert [source.name for source in reopened(tmp_path, MODEL).sources()] == ["a"]
