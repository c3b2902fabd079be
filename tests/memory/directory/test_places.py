"""A memory is written where it was opened, into its own files, and nowhere else."""

from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING, Any

import pytest

from mplus.errors import LiveMemoryError, MemoryFileError, MPlusError
from mplus.memory import Memory
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MODEL = PlainModel()


def written(path: Path | str, chunks: int = 8, **options: Any) -> Memory:
    memory = Memory.open(path, MODEL, **options)
    for number in range(chunks):
        memory.write(chunk(number), source="ab"[number % 2])
    return memory


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------- a directory is not its path


def test_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("anna", "bob"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "bob")
    written("memory").close()
    bob = files_in(tmp_path / "bob")
    monkeypatch.chdir(tmp_path / "anna")
    memory, reader = written("memory"), None
    monkeypatch.chdir(tmp_path / "bob")
    memory.write(chunk(20), source="c")
    memory.forget("a")
    memory.checkpoint()
    memory.write(chunk(21), source="c")
    reader = reopened(tmp_path / "anna" / "memory", MODEL)
    assert_same(reader, memory)
    memory.close()
    assert files_in(tmp_path / "bob") == bob
    assert_same(reopened(tmp_path / "anna" / "memory", MODEL), memory)


def test_a_save_goes_where_it_was_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mplus.memory.format import save as files

    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    memory, write_tensors = MODEL.new_memory(), files.write_tensors
    memory.write(chunk(1))

    def elsewhere(*args: Any) -> Any:
        monkeypatch.chdir(tmp_path / "there")
        return write_tensors(*args)

    monkeypatch.setattr(files, "write_tensors", elsewhere)
    monkeypatch.chdir(tmp_path / "here")
    memory.save("memory")
    assert files_in(tmp_path / "there") == {}
    assert_same(Memory.load(tmp_path / "here" / "memory", MODEL), memory)


def exchange(path: Path) -> None:
    path.rename(path.with_name("away"))
    written(path, 3).close()


def grow(journal: Path) -> None:
    with journal.open("ab") as file:
        file.write(bytes(512))


MOVES: dict[str, Callable[[Path], object]] = {
    "renamed": lambda path: path.rename(path.with_name("away")),
    "removed": shutil.rmtree,
    "exchanged": exchange,
    "link set anew": lambda path: (path.unlink(), path.symlink_to(path.with_name("other"))),
    "lock removed": lambda path: (path / "lock").unlink(),
    "lock replaced": lambda path: ((path / "lock").unlink(), (path / "lock").write_text("1\n")),
    "journal removed": lambda path: next(path.glob("journal-*")).unlink(),
    "journal cut": lambda path: os.truncate(next(path.glob("journal-*")), 512),
    "journal grown": lambda path: grow(next(path.glob("journal-*"))),
}


@pytest.mark.parametrize("change", ["write", "forget", "checkpoint", "close"])
@pytest.mark.parametrize("move", MOVES)
def test_nothing_is_written_to_another_directory(tmp_path: Path, move: str, change: str) -> None:
    path = tmp_path / "memory"
    if move == "link set anew":
        for name in ("own", "other"):
            written(tmp_path / name, 3).close()
        path.symlink_to(tmp_path / "own")
    memory = written(path)
    held = content(memory)
    MOVES[move](path)
    before = files_in(tmp_path)
    changes: dict[str, Callable[[], object]] = {
        "write": lambda: memory.write(chunk(30)),
        "forget": lambda: memory.forget("a"),
        "checkpoint": memory.checkpoint,
        "close": memory.close,
    }
    with pytest.raises(LiveMemoryError, match=r"renamed, removed or replaced|lock|journal"):
        changes[change]()
    assert difference(content(memory), held) == [], "reading goes on"
    assert files_in(tmp_path) == before
    if change != "close":
        with pytest.raises(LiveMemoryError):
            memory.write(chunk(31))
        memory.close()
        assert files_in(tmp_path) == before
    if move in {"renamed", "exchanged"}:
        assert difference(content(reopened(tmp_path / "away", MODEL)), held) == []


# ---------------------------------------------------------------------- links, pipes and other people's files


def stranger(tmp_path: Path, size: int) -> Path:
    (tmp_path / "thesis.tex").write_bytes(b"p" * size)
    return tmp_path / "thesis.tex"


PUT: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda file, thesis: file.symlink_to(thesis),
    "dangling link": lambda file, thesis: file.symlink_to(thesis.with_name("new")),
    "pipe": lambda file, thesis: os.mkfifo(file),
    "folder": lambda file, thesis: file.mkdir(),
}
OPEN: dict[str, Callable[[Path, Path], object]] = {
    "open": lambda path, out: Memory.open(path, MODEL),
    "open read-only": lambda path, out: reopened(path, MODEL).sources(),
    "load": lambda path, out: Memory.load(path, MODEL),
    "forget": lambda path, out: forget_saved(path, "a"),
    "sources": lambda path, out: saved_sources(path),
    "repair": repair,
}


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("live", [True, False], ids=["live", "saved"])
def test_what_is_not_an_own_file_is_neither_read_nor_written(tmp_path: Path, put: str, live: bool) -> None:
    path = tmp_path / "memory"
    with written(path if live else tmp_path / "source") as memory:
        memory.checkpoint()
        if not live:
            memory.save(path)
    whole = reopened(path, MODEL) if live else Memory.load(path, MODEL)
    for name in sorted(file.name for file in path.iterdir()):
        kept = (path / name).read_bytes()
        for size in (0, 411, 100_000):
            thesis = stranger(tmp_path, size)
            (path / name).unlink()
            PUT[put](path / name, thesis)
            for way, work in OPEN.items():
                if name == "lock" and way not in {"open", "forget"}:
                    continue
                out = tmp_path / f"{name}-{size}-{way}"
                if way == "repair" and live and name.startswith(("rows", "journal")):
                    assert repair(path, out) != [], "what was lost is listed"
                    continue
                with pytest.raises(MPlusError):
                    work(path, out)
            if name != "lock":
                assert verify(path) != []
            assert thesis.read_bytes() == b"p" * size
            assert not (tmp_path / "new").exists()
            (path / name).rmdir() if (path / name).is_dir() and put == "folder" else (path / name).unlink()
            (path / name).write_bytes(kept)
    assert_same(reopened(path, MODEL) if live else Memory.load(path, MODEL), whole)


@pytest.mark.parametrize("name", ["lock", "journal"])
def test_a_file_with_another_name_is_not_written_to(tmp_path: Path, name: str) -> None:
    memory = written(tmp_path / "memory")
    memory.directory.close()
    (file,) = (tmp_path / "memory").glob(f"{name}*")
    other = tmp_path / "other"
    os.link(file, other)
    before = other.read_bytes()
    with pytest.raises(MemoryFileError, match="a file with 2 names"):
        Memory.open(tmp_path / "memory", MODEL)
    with pytest.raises(MemoryFileError, match="a file with 2 names"):
        forget_saved(tmp_path / "memory", "a")
    assert other.read_bytes() == before


def test_a_lock_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    lock = tmp_path / "memory" / "lock"
    lock.write_text("pid=5; host=here")
    with pytest.raises(MemoryFileError, match=r"must be empty or hold a memory that lives there, got .* 'lock'"):
        Memory.open(tmp_path / "memory", MODEL)
    assert lock.read_text() == "pid=5; host=here"


def test_a_link_to_the_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with written(tmp_path / "link") as memory:
        pass
    assert_same(reopened(tmp_path / "own", MODEL), memory)
    MODEL.new_memory().save(tmp_path / "link" / ".." / "saved")
    assert (tmp_path / "saved" / "manifest.json").exists()


FOREIGN = (
    "rows-embeddings.safetensors",
    "rows-cafe.safetensors",
    "rows-0123456789abcdef.safetensors",
    "rows-0123456789abcdef-0123456789abcdef.safetensors",
    "state-1.safetensors",
    "state-0123456789abcdef-1.safetensors",
    "journal-9.bin",
    "manifest.json.new",
    "manifest-0123456789abcdef.json.new",
    ".mplus-mine.tmp",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    memory = MODEL.new_memory()
    memory.write(chunk(1))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text("mine")
    for work in (memory.save, lambda path: Memory.open(path, MODEL)):
        with pytest.raises(MemoryFileError, match="must be empty or hold a"):
            work(tmp_path / "data")
    assert files_in(tmp_path / "data") == {name: b"mine"}


def test_foreign_files_beside_a_memory_stay(tmp_path: Path) -> None:
    live, saved = written(tmp_path / "live"), tmp_path / "saved"
    live.save(saved)
    for folder in (tmp_path / "live", saved):
        for name in FOREIGN:
            (folder / name).write_text("mine")
    live.checkpoint()
    live.forget("a")
    live.save(saved)
    live.close()
    written(tmp_path / "live", 3).close()
    for folder in (tmp_path / "live", saved):
        forget_saved(folder, "b")
        found = files_in(folder)
        assert {name for name, data in found.items() if data == b"mine"} == set(FOREIGN)
    assert len(files_in(saved)) == len(FOREIGN) + 2
    names = {file.name for file in (tmp_path / "live").iterdir()} - set(FOREIGN)
    assert names == {*_named(tmp_path / "live"), "manifest.json", "lock"}
    assert [source.name for source in reopened(tmp_path / "live", MODEL).sources()] == ["a"]


def _named(path: Path) -> frozenset[str]:
    from mplus.memory.directory.checkpoint_manifest import read_live_manifest

    return read_live_manifest(path).files


# ---------------------------------------------------------------------- permission bits


def modes(folder: Path) -> set[str]:
    return {oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o277])
def test_files_are_their_owners_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with written(tmp_path / "new" / "live") as memory:
            memory.checkpoint()
            memory.forget("a")
            memory.save(tmp_path / "new" / "saved")
            with written(tmp_path / "new" / "shared", file_mode=0o640) as shared:
                shared.save(tmp_path / "new" / "sent", file_mode=0o644)
            with written(tmp_path / "new" / "shared") as again:  # opened and saved as it was made
                again.checkpoint()
                again.save(tmp_path / "new" / "sent")
        forget_saved(tmp_path / "new" / "sent", "b")
        forget_saved(tmp_path / "new" / "saved", "b")
        forget_saved(tmp_path / "new" / "live", "b")
        forget_saved(tmp_path / "new" / "shared", "b")
    finally:
        os.umask(before)
    new = tmp_path / "new"
    found = {
        name: (modes(new / name), oct(stat.S_IMODE((new / name).stat().st_mode)))
        for name in ("live", "saved", "shared", "sent")
    }
    assert found == {
        "live": ({"0o600"}, "0o700"),
        "saved": ({"0o600"}, "0o700"),
        "shared": ({"0o640"}, "0o750"),
        "sent": ({"0o644"}, "0o755"),
    }
    assert stat.S_IMODE(new.stat().st_mode) == 0o700


def test_a_folder_that_exists_keeps_its_bits(tmp_path: Path) -> None:
    for name in ("live", "saved"):
        (tmp_path / name).mkdir(mode=0o755)
    with written(tmp_path / "live") as memory:
        memory.save(tmp_path / "saved")
    for name in ("live", "saved"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o755
        assert modes(tmp_path / name) == {"0o600"}
