"""The demo's report on the screen, and its figure."""

from __future__ import annotations

from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from mplus.cli.demo.recall import RecallDemo, right
from mplus.errors import ConfigError, MissingDependencyError
from mplus.evaluation.reports.tables import show as show_curves
from mplus.facts import words

NO_FIGURE = "matplotlib is not installed, so there is no figure: pip install 'mplus[eval]'"


def check_figure(path: Path) -> None:
    """Raise ConfigError unless a figure can be written to ``path``."""
    from mplus.evaluation.reports.plots import check_paths

    check_paths([path])
    if not path.parent.is_dir():
        raise ConfigError(f"--plot must be a file in a folder that is there, got {path}")


def save_figure(report: RecallDemo, path: Path) -> Path | None:
    """Draw the curves; None where matplotlib is missing."""
    from mplus.evaluation.reports.plots import draw

    try:
        return draw(report.curves, path)[0]
    except MissingDependencyError:
        return None


def show(report: RecallDemo, figure: Path | None, console: Console | None = None) -> None:
    """Print a report."""
    console = console if console is not None else Console(highlight=False)
    made = "comes with mplus" if report.training_seconds is None else f"trained here in {report.training_seconds:.0f} s"
    console.print(
        f"\nA decoder of {report.parameters:,} parameters ({made}) was told {report.facts} facts, then "
        f"{report.chunks - report.facts} others, {report.tokens:,} tokens in all.\nEach layer keeps "
        f"{report.long_term_rows:,} long-term rows; an answer attends to {report.attended} rows and tokens.\n"
    )
    console.print(_questions(report))
    told = [one for one in report.asked if one.told_as is not None]
    untold = [one for one in report.asked if one.told_as is None]
    console.print(
        "ago: chunks told since. row from: where the retrieved row with the best score was written. known: how sure "
        "the decoder is that it was told.\n"
    )
    console.print(
        f"Right: {right(told)} of {len(told)} told, {right(untold)} of {len(untold)} never told (the right answer is "
        f"then '{words.UNKNOWN}').\n"
    )
    show_curves(attrs.evolve(report.curves, settings={}, circumstances={}), console)
    console.print("Every setting: mplus demo --json")
    console.print(f"Figure: {figure}" if figure is not None else NO_FIGURE, markup=False, soft_wrap=True)
    console.print(f"{report.seconds:.0f} seconds in all, imports included.")


def _questions(report: RecallDemo) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("question")
    for name in ("told as", "ago", "right", "M+", "STM only", "row from", "known"):
        table.add_column(name, justify="right" if name in {"ago", "known"} else "left", no_wrap=True)
    for one in report.asked:
        mark = "green" if one.right else "red"
        table.add_row(
            one.answer.question,
            one.told_as or "never",
            "-" if one.age is None else str(one.age),
            one.value or words.UNKNOWN,
            f"[{mark}]{one.answer.words}[/]",
            one.short_term.words,
            one.answer.source or "-",
            f"{one.answer.known:.2f}",
        )
    return table
