"""The bytes of a memory, without opening it."""

from __future__ import annotations

import pytest

import mplus
from mplus.errors import MemoryFileError
from mplus.memory import Memory
from tests.memory.disks.plain import PlainModel, chunk

MODEL = PlainModel()


def test_it_is_what_the_files_have_and_what_an_opening_reads(tmp_path):
    with Memory.open(tmp_path / "live", MODEL) as memory:
        sizes = []
        for number in range(9):
            memory.write(chunk(number), source="a")
            sizes.append(mplus.memory_bytes(tmp_path / "live"))
        assert [size.disk for size in sizes] == sorted({size.disk for size in sizes}), "the journal grows"
        memory.checkpoint()
        manifest, size = memory.directory.manifest, mplus.memory_bytes(tmp_path / "live")
        assert size.disk == sum(file.stat().st_size for file in (tmp_path / "live").iterdir())
        assert size.ram == manifest.state.bytes
        memory.write(chunk(9))
        assert mplus.memory_bytes(tmp_path / "live").ram == manifest.state.bytes + memory.directory.journal_bytes
        memory.save(tmp_path / "saved")
    saved = mplus.memory_bytes(tmp_path / "saved")
    assert saved.disk == sum(file.stat().st_size for file in (tmp_path / "saved").iterdir()) > saved.ram > 0
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MemoryFileError):
            mplus.memory_bytes(path)
