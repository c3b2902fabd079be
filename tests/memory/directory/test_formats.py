"""Directories of every format version stay readable."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from attrs import evolve

from mplus.memory import Memory
from mplus.memory.directory.checkpoint_manifest import VERSION, read_live_manifest
from mplus.memory.format.verify import verify
from mplus.memory.sources.table import SourceTable
from mplus.stores.disk.block_file import BlockFile
from mplus.stores.disk.checksums import FIRST, PRESENT
from tests.fixtures import (
    make_live_v1,
    make_live_v2,
    make_live_v3,
    make_live_v4,
    make_live_v5,
    make_memory_v2,
    make_memory_v3,
)
from tests.fixtures.make_memory_v1 import build_model, text
from tests.memory.tiny import assert_same, content

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.two_computations

FOLDERS = {
    1: (make_live_v1.FOLDER, FIRST, make_live_v1.write),
    2: (make_live_v2.FOLDER, PRESENT, make_live_v1.write),
    3: (make_live_v3.FOLDER, PRESENT, make_memory_v2.write),
    4: (make_live_v4.FOLDER, PRESENT, make_memory_v2.write),
    5: (make_live_v5.FOLDER, PRESENT, make_memory_v3.write),
}
"""Folder, kind of checksums, and what was written."""


def test_there_is_one_of_every_version() -> None:
    assert list(FOLDERS) == list(range(1, VERSION + 1))


def undated(table: SourceTable, *, known: bool) -> SourceTable:
    """The sources as earlier versions wrote them: without times but for those ``known`` that were given by hand."""
    entries = {number: evolve(source, time=None, last_time=None) for number, source in table.items()}
    if known:
        entries = {number: make_memory_v2.with_facts(source) for number, source in entries.items()}
    return SourceTable.of(entries, table.next_number)


@pytest.mark.parametrize("version", FOLDERS)
def test_an_old_directory_is_read_and_goes_on(tmp_path: Path, version: int) -> None:
    folder, scheme, write = FOLDERS[version]
    text_of_manifest = (folder / "manifest.json").read_text(encoding="utf-8")
    assert f'"version": {version},' in text_of_manifest
    manifest = read_live_manifest(folder)
    for entry in (manifest.state, *(file for store in manifest.stores for file in store.files)):
        assert BlockFile(folder / entry.file, entry).scheme is scheme
    model = build_model()
    new = model.new_memory(batch_size=2, seed=3, keep_text=version > 2)
    write(new)
    old = Memory.open(shutil.copytree(folder, tmp_path / "old"), model)
    found, expected = content(old), content(new)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):  # computed by other kernels than those of the machine that wrote the files
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
        elif name.endswith(".writes"):
            assert [evolve(one, seconds=0.0) for one in found[name]] == [evolve(one, seconds=0.0) for one in value]
        elif name.endswith(".sources"):
            assert found[name] == (value if version == VERSION else undated(value, known=version > 2))
        else:
            assert found[name] == value
    assert old.directory is not None
    assert old.directory.journal_bytes > 0
    old.write([text(20, 9), text(20, 10)])
    assert f'"version": {VERSION},' in (tmp_path / "old" / "manifest.json").read_text(encoding="utf-8")
    assert_same(Memory.open(tmp_path / "old", model, read_only=True), old)
    old.write([text(9, 11), None], source="notes")
    assert_same(Memory.open(tmp_path / "old", model, read_only=True), old)
    old.close()
    assert f'"version": {VERSION},' in (tmp_path / "old" / "manifest.json").read_text(encoding="utf-8")
    assert_same(Memory.open(tmp_path / "old", model, read_only=True), old)
    assert verify(tmp_path / "old") == []


def test_a_killed_writer_of_an_old_directory_loses_nothing(tmp_path: Path) -> None:
    """Its journal takes no records of the present version, so that the first chunk makes a checkpoint."""
    model = build_model()
    old = Memory.open(shutil.copytree(make_live_v2.FOLDER, tmp_path / "old"), model)
    old.write([text(8, 9), text(8, 10)], source="new")
    shutil.copytree(tmp_path / "old", tmp_path / "killed")
    again = Memory.open(tmp_path / "killed", model)
    assert_same(again, old)
    assert [source.name for source in again.sources()] == [None, "new"], "nothing is left of the first"


def test_what_nothing_writes_yet_is_read_from_checkpoint_and_journal(tmp_path: Path) -> None:
    memory = Memory.open(shutil.copytree(make_live_v3.FOLDER, tmp_path / "memory"), build_model())
    for _ in range(2):
        for row, state in enumerate(memory.states):
            assert [(part.ids.tolist(), part.source) for part in state.tail] == [([1, 51, 7], 0)] * (row == 0)
            for source in state.sources:
                assert source == make_memory_v2.with_facts(source)
        memory.checkpoint()
    assert memory.forgotten(0) == []
    assert memory.forgotten(1) == ["gone, but for its name"]


@pytest.mark.parametrize("version", FOLDERS)
def test_the_files_are_sound(version: int) -> None:
    assert verify(FOLDERS[version][0]) == []


@pytest.mark.parametrize("version", FOLDERS)
def test_every_altered_byte_of_rows_is_found(tmp_path: Path, version: int) -> None:
    path = shutil.copytree(FOLDERS[version][0], tmp_path / "memory")
    (file, *_) = sorted(path.glob("rows-*"))
    data = file.read_bytes()
    for place in range(0, len(data), len(data) // 40):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
        assert verify(path) != [], place
