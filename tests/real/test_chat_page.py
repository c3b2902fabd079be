"""The page about chat models, done as it says, with the model that answers on it."""

from __future__ import annotations

import pytest

from tests.helpers.pages import DOCS, run_page


@pytest.mark.usefixtures("folder")
def test_the_model_answers_as_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, shown = run_page(DOCS / "chat-memory.md")
    assert shown == 4
