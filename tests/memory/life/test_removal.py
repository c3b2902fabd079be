"""Deleting a memory: at once, for good, nothing but its own files, and with what reads it going on."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

import mplus
from mplus.errors import LiveMemoryError, MemoryFileError, MPlusError
from mplus.memory import Memory
from mplus.memory.directory.removal import remove_deleted
from tests.memory.disks.disks import Failing, open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.tiny import content, difference

if TYPE_CHECKING:
    from pathlib import Path

MODEL = PlainModel()


def written(path: Path, chunks: int = 9) -> Memory:
    memory = open_memory(path, MODEL)
    for number in range(chunks):
        memory.write(chunk(number), source="ab"[number % 2])
    memory.checkpoint()
    memory.write(chunk(chunks))
    return memory


def test_nothing_is_left_of_it(tmp_path):
    path = tmp_path / "anna"
    with written(path) as memory, pytest.raises(LiveMemoryError, match="by process"):
        mplus.delete_memory(path)
    held = content(memory)
    view = memory.snapshot()[0]
    mplus.delete_memory(path)
    assert list(tmp_path.iterdir()) == []
    assert difference(content(memory), held) == [], "whoever read it goes on"
    assert view.store.gather(0, view.store.ids(0)).hidden.isfinite().all()
    with Memory.open(path, MODEL) as new:
        assert new.is_empty


def test_what_is_not_the_memory_s_is_not_deleted(tmp_path):
    path = tmp_path / "anna"
    written(path).close()
    held = content(reopened(path))
    for name in ("notes.txt", "rows-0123456789abcdef-01.safetensors"):
        (path / name).write_text("mine")
        with pytest.raises(MemoryFileError, match="hold a memory and nothing else to be deleted, got"):
            mplus.delete_memory(path)
        (path / name).unlink()
    (path / "folder").mkdir()
    with pytest.raises(MemoryFileError, match="got 'folder'"):
        mplus.delete_memory(path)
    (path / "folder").rmdir()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(MemoryFileError, match="is a link: name the folder itself"):
        mplus.delete_memory(tmp_path / "link")
    (tmp_path / "other").mkdir()
    for other in (tmp_path / "other", tmp_path, tmp_path / "nowhere", tmp_path / "nul\0"):
        with pytest.raises(MemoryFileError):
            mplus.delete_memory(other)
    MODEL.new_memory().save(tmp_path / "saved")
    with pytest.raises(MemoryFileError, match=r"a folder that a memory lives in \(Memory.open\), and is not"):
        mplus.delete_memory(tmp_path / "saved")
    assert not (tmp_path / "saved" / "lock").exists()
    assert difference(content(reopened(path)), held) == []
    (path / "manifest.json").write_text("damaged")
    mplus.delete_memory(path)
    assert not path.exists()


def test_whatever_fails_leaves_it_whole_or_gone(tmp_path):
    written(tmp_path / "spare").close()
    held, calls, at = content(reopened(tmp_path / "spare")), 10**9, 0
    while at <= calls:
        path, files = tmp_path / str(at) / "anna", Failing()
        shutil.copytree(tmp_path / "spare", path)
        files.fail(at or 10**9, lasting=at % 2 == 0, late=at % 3 == 0)
        raised = True
        try:
            mplus.delete_memory(path, files=files)
            raised = False
        except MPlusError:
            pass
        calls = calls if at else files.calls
        assert bool(files.failed) == bool(at)
        if path.exists():
            assert raised
            assert difference(content(reopened(path)), held) == []
            mplus.delete_memory(path)
        assert remove_deleted(path.parent) == []
        assert list(path.parent.iterdir()) == []
        at += 1
    assert calls > 8


def test_what_a_crash_has_left_is_removed_by_the_next_one_and_nothing_else(tmp_path):
    written(tmp_path / "anna").close()
    written(tmp_path / ".mplus-deleted-0123456789abcdef").close()
    (tmp_path / ".mplus-deleted-fedcba9876543210").mkdir()
    (tmp_path / ".mplus-deleted-notes").mkdir()
    assert remove_deleted(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mplus-deleted-notes", "anna"]
    assert remove_deleted(tmp_path) == []
    with pytest.raises(MemoryFileError):
        remove_deleted(tmp_path / "nowhere")
    kept = tmp_path / ".mplus-deleted-0123456789abcdef"
    (kept / "folder").mkdir(parents=True)
    assert remove_deleted(tmp_path) == [kept], "which somebody has put something into"
