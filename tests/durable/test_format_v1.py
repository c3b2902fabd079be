"""Directories of format version 1 stay readable."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch

from mplus.memory import Memory
from mplus.memory.verify import verify
from tests.fixtures import make_live_v1 as made
from tests.fixtures.make_memory_v1 import build_model, text
from tests.memory.tiny import assert_same, content

if TYPE_CHECKING:
    from pathlib import Path


def test_an_old_directory_is_read_and_goes_on(tmp_path: Path) -> None:
    model = build_model()
    new = model.new_memory(batch_size=2, seed=3)
    made.write(new)
    old = Memory.open(shutil.copytree(made.FOLDER, tmp_path / "old"), model)
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
    assert_same(Memory.open(tmp_path / "old", model, read_only=True), old)


def test_the_files_are_sound() -> None:
    assert verify(made.FOLDER) == []
