"""The page about chat models, done as it says, with a small decoder in place of the chat model on the page.

What the chat model answers is compared in ``tests/real``.
"""

from __future__ import annotations

import shutil

import pytest

from mplus.hf.pretrained import smollm2
from mplus.hf.pretrained.shipped import STORIES260K
from tests.chat.conftest import tokenizer  # noqa: F401 - a fixture
from tests.helpers.pages import DOCS, run_page

PAGE = DOCS / "chat-memory.md"


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):  # noqa: F811 - a fixture
    """A chat model that is found in the place of SmolLM2."""
    folder = tmp_path / "model"
    shutil.copytree(STORIES260K, folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(smollm2, "get_smollm2", lambda: folder)


@pytest.mark.usefixtures("folder")
def test_every_block_runs(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names, shown = run_page(PAGE, compare=False)
    assert shown == 4
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"assistant", "retriever"}
    assert names["memory"].sources() == [source for source in names["memory"].sources() if "Ines" not in source.name]
