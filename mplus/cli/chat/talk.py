"""Talk: lines that are typed, answers as they come, and commands that begin with a slash."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mplus.chat import Chat, Recalled
from mplus.errors import InputError, MPlusError

HELP = """\
/sources       what is in memory, and what is still in the prompt
/search TEXT   what memory has on TEXT, without an answer
/forget NAME   forget one of the sources
/read FILE     read a text file into memory
/off, /on      answer without memory, to compare; what is said then is not kept
/quit          leave (or Ctrl-D); Ctrl-C ends an answer
Everything else is said to the decoder."""


class Talk:
    """A conversation in a terminal, or with lines from a pipe.

    Attributes:
        chat: the session.
        console: where everything is printed.
    """

    def __init__(self, chat: Chat, console: Console | None = None, read: Callable[[str], str] | None = None) -> None:
        """Args: ``read`` returns the next line, given a prompt, and raises EOFError at the end; default: ``input``."""
        self.chat = chat
        self.console = console if console is not None else Console(highlight=False, soft_wrap=True)
        self._read = read if read is not None else input
        self._prompt = "> " if sys.stdin.isatty() else ""
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.console.print(HELP, markup=False),
            "/sources": lambda _: self._sources(),
            "/search": self._search,
            "/forget": self._forget,
            "/read": self._read_file,
            "/off": lambda _: self._switch(on=False),
            "/on": lambda _: self._switch(on=True),
        }

    def run(self) -> None:
        """Talk until the end of the lines, or /quit. Errors of mplus are said, and the conversation goes on."""
        known = 0 if self.chat.memory is None else len(self.chat.memory.sources())
        self.console.print(f"[dim]{known} source{'s' * (known != 1)} in memory. /help lists the commands.[/]")
        while True:
            try:
                line = self._read(self._prompt).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print("[dim]/quit or Ctrl-D leaves[/]")
                continue
            if line == "/quit":
                return
            try:
                if line:
                    self._do(line)
            except KeyboardInterrupt:
                self.console.print("\n[dim](interrupted)[/]")
            except MPlusError as error:
                self.console.print(str(error), style="red", markup=False)

    def _do(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not command.startswith("/"):
            self._answer(line)
        elif command in self._commands:
            self._commands[command](rest.strip())
        else:
            raise InputError(f"a command must be one of {', '.join(self._commands)} and /quit, got {command!r}")

    def _answer(self, line: str) -> None:
        answer = self.chat.stream(line, keep=self.chat.recalls)
        for piece in answer:
            self.console.out(piece, end="", highlight=False)
        self.console.print()
        reply = answer.reply
        if reply.recalled:
            self.console.print(f"[dim]from memory: {escape(described(reply.recalled))}[/]")

    def _sources(self) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("source", "written", "tokens"):
            table.add_column(column, justify="right" if column == "tokens" else "left", overflow="fold")
        if self.chat.memory is not None:
            for source in self.chat.memory.sources():
                written = ago(source.last_written)
                table.add_row(escape(source.name or "(no name)"), written, f"{source.tokens:,}")
        for exchange in self.chat.exchanges:
            table.add_row(escape(exchange.name), "in the prompt", "")
        self.console.print(table) if table.row_count else self.console.print("[dim]nothing yet[/]")

    def _search(self, text: str) -> None:
        if self.chat.memory is None:
            raise InputError("searching needs a memory to search")
        found = self.chat.memory.search(text)
        for one in found:
            words = "" if one.text is None else " ".join(one.text.split())
            self.console.print(f"{one.score:6.2f}  {escape(words)} [dim]({escape(one.source or '(no name)')})[/]")
        if not found:
            self.console.print("[dim]nothing[/]")

    def _forget(self, name: str) -> None:
        self.chat.forget(name)
        self.console.print(f"[dim]forgotten: {escape(name)}[/]")

    def _read_file(self, name: str) -> None:
        path = Path(name).expanduser()
        if self.chat.memory is None:
            raise InputError("reading a file needs a memory to read it into")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"/read needs a text file, got {name!r}: {error}") from error
        report = self.chat.memory.write(text, source=path.name)
        self.console.print(f"[dim]{sum(report.tokens):,} tokens of {escape(path.name)} are in memory[/]")

    def _switch(self, *, on: bool) -> None:
        self.chat.recalls = on
        self.console.print(f"[dim]memory {'on' if on else 'off: answers know the prompt alone'}[/]")


def described(recalled: Sequence[Recalled]) -> str:
    """Return in a line what was recalled: each piece with its source, how long ago it was written, and its score."""
    parts = []
    for one in recalled:
        facts = [ago(one.written), f"{one.rows} tokens" if one.rows > 1 else ""]
        facts.append("" if one.score is None else f"score {one.score:.2f}")
        known = ", ".join(fact for fact in facts if fact)
        parts.append((one.source or "(no name)") + (f" ({known})" if known else ""))
    return "; ".join(parts)


def ago(moment: datetime | None) -> str:
    """Format the time since a moment, such as "3 days ago"; "" where it is not known."""
    if moment is None:
        return ""
    seconds = max((datetime.now(UTC) - moment).total_seconds(), 0.0)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if count := int(seconds // size):
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
