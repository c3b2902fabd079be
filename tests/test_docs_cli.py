"""The page about the command line is what the commands say."""

from __future__ import annotations

from tools import cli_reference


def test_the_page_is_current() -> None:
    written = cli_reference.PAGE.read_text(encoding="utf-8")
    assert written == cli_reference.render(), "run: python -m tools.cli_reference"


def test_the_page_has_every_command_and_no_hidden_one() -> None:
    page = cli_reference.render()
    for command in ("demo", "info", "plugins", "replay", "import", "memory show", "memory verify"):
        assert f"\n## mplus {command}\n" in page
    assert "demo-continue" not in page
