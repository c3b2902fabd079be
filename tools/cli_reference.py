"""Write ``docs/cli.md`` from the commands themselves: ``python -m tools.cli_reference``."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from mplus.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
PREAMBLE = """
# Command line

`pip install .` brings the command `mplus`; `python -m mplus.cli` is the same. An error ends a command with one line on
stderr and exit code 2; `mplus --debug COMMAND` prints where it was raised as well.

This page is made from what `mplus COMMAND --help` says.
"""


def render() -> str:
    """The page."""
    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="mplus", **root.context_settings)
    parts = [PREAMBLE.strip(), *_options(root, context)]
    for path, command, inner in _commands(root, context):
        parts += [f"## {path}", *_describe(command, inner)]
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every command that does something, with its full name and a context, in the order of ``--help``."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        inner = command.context_class(command, info_name=name, parent=context)
        if hasattr(command, "commands"):
            yield from _commands(command, inner)
        else:
            yield inner.command_path, command, inner


def _describe(command: Any, context: Any) -> list[str]:
    # Docstrings break lines for the source; Markdown flows them again.
    text = [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n")]
    usage = " ".join(command.get_usage(context).split()).removeprefix("Usage: ")
    return [f"    {usage}", *filter(None, text), *_options(command, context)]


def _options(command: Any, context: Any) -> list[str]:
    """A table of arguments and options, or nothing."""
    parameters = [parameter for parameter in command.get_params(context) if parameter.name != "help"]
    records = [parameter.get_help_record(context) for parameter in parameters]
    rows = [f"| <code>{_escaped(name)}</code> | {_escaped(text)} |" for name, text in filter(None, records)]
    return ["\n".join(["| argument or option | meaning |", "| --- | --- |", *rows])] if rows else []


def _escaped(text: str) -> str:
    """One line that is no markup and does not end a cell."""
    return html.escape(re.sub(r"\s+", " ", text), quote=False).replace("|", "&#124;")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
