"""The quickstart, done as it says: every block of Python run in order, output compared."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "quickstart"}
    printed = io.StringIO()
    shown = []
    for block in BLOCK.finditer(page):
        language, title, text = block["language"], block["title"], block["text"]
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python":
            printed = io.StringIO()
            # Line numbers of a traceback are those of the page.
            code = compile("\n" * page[: block.start("text")].count("\n") + text, str(PAGE), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        else:
            assert language == "text", f"neither a file, nor a program, nor its output: {block[0]}"
            expect(text, printed.getvalue())
            shown.append(text)
    assert len(shown) >= 8
    assert {path.name for path in tmp_path.iterdir()} == {
        "garden",
        "garden-model",
        "garden-adapter",
        "garden-both",
        "memory.toml",
        "memory.json",
    }


def expect(lines: str, printed: str) -> None:
    """Each line is part of a later line of the output than the one before it."""
    rest = iter(printed.splitlines())
    for line in lines.splitlines():
        assert any(line in output for output in rest), f"{line!r} is not, or not in this place, in\n{printed}"
