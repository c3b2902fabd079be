"""Directories of every format version stay readable."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from mplus.memory import Memory
from mplus.memory.durable.manifest import VERSION, read_live_manifest
from mplus.memory.verify import verify
from mplus.stores.disk.blocks import BlockFile
from mplus.stores.disk.sums import FIRST, PRESENT
from tests.fixtures import make_live_v1, make_live_v2
from tests.fixtures.make_memory_v1 import build_model, text
from tests.memory.tiny import assert_same, content

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.two_computations

FOLDERS = {1: (make_live_v1.FOLDER, FIRST), 2: (make_live_v2.FOLDER, PRESENT)}


def test_there_is_one_of_every_version() -> None:
    assert list(FOLDERS) == list(range(1, VERSION + 1))


@pytest.mark.parametrize("version", FOLDERS)
def test_an_old_directory_is_read_and_goes_on(tmp_path: Path, version: int) -> None:
    folder, scheme = FOLDERS[version]
    text_of_manifest = (folder / "manifest.json").read_text(encoding="utf-8")
    assert f'"version": {version},' in text_of_manifest
    manifest = read_live_manifest(folder)
    for entry in (manifest.state, *(file for store in manifest.stores for file in store.files)):
        assert BlockFile(folder / entry.file, entry).scheme is scheme
    model = build_model()
    new = model.new_memory(batch_size=2, seed=3)
    make_live_v1.write(new)
    old = Memory.open(shutil.copytree(folder, tmp_path / "old"), model)
    found, expected = content(old), content(new)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):  # computed by other kernels than those of the machine that wrote the files
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
        else:
            assert found[name] == value
    assert old.directory is not None
    assert old.directory.journal_bytes > 0
    old.write([text(20, 9), text(20, 10)])
    old.close()
    assert f'"version": {VERSION},' in (tmp_path / "old" / "manifest.json").read_text(encoding="utf-8")
    assert_same(Memory.open(tmp_path / "old", model, read_only=True), old)
    assert verify(tmp_path / "old") == []


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
