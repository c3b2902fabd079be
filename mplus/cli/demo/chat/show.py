"""The report of the demo on a chat model on the screen: a table, a picture in letters, and what was said."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mplus.cli.chat.talk import described
from mplus.cli.demo.chat.asking import Said
from mplus.cli.demo.chat.findings import ArmFinding, ChatDemo
from mplus.cli.demo.chat.run import TEXT, WINDOW, WITH, WITHOUT
from mplus.cli.output import size

WIDTH = 60
"""Characters of the picture."""
RIGHT, WRONG, NOVEL = "●", "○", "·"


def show_chat_demo(found: ChatDemo, console: Console | None = None) -> None:
    """Print the report."""
    console = console if console is not None else Console(highlight=False)
    speed = found.tokens / found.write_seconds
    console.print(
        f"\n[bold]{escape(found.model)}[/] ({found.parameters / 1e6:,.0f} million parameters, never trained for this) "
        f"read {found.tokens:,} tokens:\na novel, with notes about people and a conversation in it, a line here and "
        f"there. It kept them as [bold]{escape(found.mechanism)}[/] ({speed:,.0f} tokens/s, to disk)."
    )
    console.print(f"Then it was asked {len(found.arms[0].said)} questions about the people.\n")
    console.print(_table(found))
    _remarks(found, console)
    console.print(_picture(found))
    console.print("[bold]With memory[/]")
    answers = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for one in found.arms[0].said:
        mark = f"[green]{RIGHT}[/]" if one.right else f"[red]{WRONG}[/]"
        answers.add_row(mark, escape(_asked(one)), escape(one.text))
    console.print(answers)
    console.print("[bold]Never told[/]")
    console.print(_never(found.untold))
    again = found.reopened
    same = sum(one.text == before.text for one, before in zip(again.said, found.arms[0].said, strict=False))
    right = sum(bool(one.right) for one in again.said)
    console.print(
        f"[bold]A new process[/] opened the memory in {again.open_seconds:.1f} s and was asked the first "
        f"{len(again.said)} again: {right} right, {same} answers the same word for word.\n"
    )
    console.print(
        f"{found.seconds:.0f} seconds in all, {found.threads} thread{'s' * (found.threads > 1)}, seed {found.seed}. "
        "Every setting and answer: mplus demo --json. A toy that was trained to remember: mplus demo --recall."
    )


def _table(found: ChatDemo) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("the model has")
    for column in ("right", "first token after", "keeps"):
        table.add_column(column, justify="right")
    for arm in found.arms:
        right = f"[{'green' if arm.name == WITH else 'default'}]{arm.right} of {len(arm.said)}[/]"
        kept = "-" if arm.bytes is None else size(arm.bytes)
        table.add_row(_named(arm, found), right, f"{arm.first_seconds:.2f} s", kept)
    return table


def _named(arm: ArmFinding, found: ChatDemo) -> str:
    names = {
        WITH: f"its memory of all {found.tokens:,} tokens",
        WITHOUT: "nothing but the question",
        WINDOW: f"the last {arm.text_tokens or 0:,} tokens in its window",
        TEXT: "the pieces that memory brought back, as text",
    }
    return names[arm.name]


def _remarks(found: ChatDemo, console: Console) -> None:
    window = next(arm for arm in found.arms if arm.name == WINDOW)
    console.print(
        f"[dim]The window was read once, in {window.prefill_seconds or 0:.0f} s, for all questions; finding the text "
        "is not in the time of the last row. Times are those of the first questions, asked one by one; the others were "
        "asked side by side, but for those behind the window. An answer is right when it has the right word.[/]\n"
    )


def _picture(found: ChatDemo) -> Table:
    """Return where the answers stood in what was read, and which of them each way could give."""
    columns: list[int] = []
    for place in found.places:
        column = min(int(place * WIDTH), WIDTH - 1)
        while column in columns and column < WIDTH - 1:
            column += 1
        columns.append(column)
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_row("", "first read " + "─" * (WIDTH - 21) + " last read")
    for arm in found.arms:
        line = [NOVEL] * WIDTH
        for column, said in zip(columns, arm.said, strict=True):
            line[column] = RIGHT if said.right else WRONG
        table.add_row(arm.name, "".join(line))
    table.caption = f"{RIGHT} answered right, {WRONG} not; each stands where its answer was told"
    return table


def _never(said: Sequence[Said]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for one in said:
        best = max(one.recalled, key=lambda piece: piece.score or 0.0, default=None)
        brought = "nothing came back" if best is None else f"best of what came back: {described([best])}"
        table.add_row("", escape(_asked(one)), f"{escape(one.text)} [dim]({escape(brought)})[/]")
    return table


def _asked(said: Said) -> str:
    """Return the question without what is asked of its answer."""
    return said.question.text.partition("?")[0] + "?"
