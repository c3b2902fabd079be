"""The page about many users, done as it says; what needs a server is run by tests/serving."""

from __future__ import annotations

from tests.helpers.pages import DOCS, run_page


def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, shown = run_page(DOCS / "many-users.md")
    assert shown == 1
    assert {path.name for path in tmp_path.iterdir()} == {"ask_openai.py", "ask.sh"}
