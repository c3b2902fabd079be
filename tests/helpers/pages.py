"""Pages of the documentation, done as they say: their blocks are run in order, and print what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


def run_page(file: Path, *, compare: bool = True) -> tuple[dict[str, Any], int]:
    """Run a page in the current folder: write its files, run its Python, compare its output.

    Args:
        file: the page.
        compare: its output with what was printed; False where another decoder speaks than on the page.

    Returns:
        The names that the programs have defined, and how many blocks of output were compared.
    """
    page = file.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": file.stem}
    printed, shown = io.StringIO(), 0
    for block in BLOCK.finditer(page):
        language, title, text = block["language"], block["title"], block["text"]
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python":
            printed = io.StringIO()
            # Line numbers of a traceback are those of the page.
            code = compile("\n" * page[: block.start("text")].count("\n") + text, str(file), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        else:
            assert language == "text", f"neither a file, nor a program, nor its output: {block[0]}"
            if compare:
                _expect(text, printed.getvalue())
            shown += 1
    return names, shown


def _expect(lines: str, printed: str) -> None:
    """Each line is part of a later line of the output than the one before it."""
    rest = iter(printed.splitlines())
    for line in lines.splitlines():
        assert any(line in output for output in rest), f"{line!r} is not, or not in this place, in\n{printed}"
