"""The page about the command line is what the commands say, and every page names commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mplus.cli.eval_chat import TOLD
from tools import cli_reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    "chat",
    "demo",
    "demo-novel",
    "get",
    "info",
    "plugins",
    "replay",
    "serve",
    "train",
    "train-retriever",
    "import",
    "memory show",
    "memory verify",
}
COMMANDS |= {f"memory {name}" for name in ("forget", "repair", "sources", "expire", "pin", "unpin", "rewrite", "text")}
COMMANDS |= {f"keys {name}" for name in ("make", "list", "revoke")}
COMMANDS |= {f"eval {name}" for name in TOLD}
COMMANDS |= {"eval retention", "eval harm", "eval retriever", "eval abstention"}
COMMANDS |= {"bench read", "bench write", "bench decode", "bench score", "bench attention", "bench store"}


def test_the_page_is_current() -> None:
    written = cli_reference.PAGE.read_text(encoding="utf-8")
    assert written == cli_reference.render(), "run: python -m tools.cli_reference"


def test_the_page_has_every_command_and_no_hidden_one() -> None:
    assert set(re.findall(r"^## mplus (.*)$", cli_reference.render(), re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_elsewhere_exist(page) -> None:
    named = re.findall(r"`mplus ([a-z][a-z ]*)", page.read_text(encoding="utf-8"))
    for name in named:
        assert any(name.strip().startswith(command) for command in COMMANDS), name
