"""The reports of both demos on the screen, and the figure."""

from __future__ import annotations

from pathlib import Path

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mplus.cli.demo.recall import RecallDemo, right
from mplus.cli.demo.report import DemoReport
from mplus.cli.output import counts, size
from mplus.errors import ConfigError, MissingDependencyError
from mplus.evaluation.reports.tables import show as show_curves
from mplus.facts.language import UNKNOWN

SOURCES = 8
"""Sources listed by name; the rest are counted."""

NOT_TRAINED = (
    "this decoder has not yet been trained to use its memory. Its retriever has random weights, so it does not choose "
    "rows for what they say, and that memory changes the story does not mean that it helps. What works is everything "
    "around it: writing, keeping, retrieving, reading, saving."
)

NO_FIGURE = "matplotlib is not installed, so there is no figure: pip install 'mplus[eval]'"


def check_figure(path: Path) -> None:
    """Raise ConfigError unless a figure can be written to ``path``."""
    from mplus.evaluation.reports.plots import check_paths

    check_paths([path])
    if not path.parent.is_dir():
        raise ConfigError(f"--plot must be a file in a folder that is there, got {path}")


def save_figure(report: RecallDemo, path: Path) -> Path | None:
    """Draw the curves; return None where matplotlib is missing."""
    from mplus.evaluation.reports.plots import draw

    try:
        return draw(report.curves, path)[0]
    except MissingDependencyError:
        return None


def show_recall(report: RecallDemo, figure: Path | None, console: Console | None = None) -> None:
    """Print the report of the facts."""
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
        f"then '{UNKNOWN}').\n"
    )
    show_curves(attrs.evolve(report.curves, settings={}, circumstances={}), console)
    console.print("Every setting: mplus demo --recall --json")
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
            one.value or UNKNOWN,
            f"[{mark}]{one.answer.words}[/]",
            one.short_term.words,
            one.answer.source or "-",
            f"{one.answer.known:.2f}",
        )
    return table


def show_novel(report: DemoReport, kept: bool, console: Console | None = None) -> None:
    """Print the report of the novel; ``kept``: what it saved stays on disk."""
    console = console if console is not None else Console(highlight=False)
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    console.print(f"\n[bold]{report.novel}[/]")
    console.print(
        f"read by stories260K, a decoder of {report.parameters:,} parameters (CPU, {threads}, seed {report.seed})\n"
    )
    console.print(_kept(report), "")
    console.print(_speeds(report))
    _retrieved(report, console)
    console.print(f"\n[bold]{escape(report.story.prompt)} ...[/]")
    for title, text in (("with memory", report.story.with_memory), ("without", report.story.without_memory)):
        console.print(f"[dim]{title:>12}[/]  ... {escape(text.strip())}")
    _saved(report, kept, console)
    console.print(f"\n[bold]Mind:[/] {NOT_TRAINED}\n{report.seconds:.0f} seconds in all, imports included.")


def _kept(report: DemoReport) -> Table:
    config, places, layers = report.config, report.positions, report.layers
    held = [f"{counts([layer.held[name] for layer in layers])} {name}" for name in layers[0].held]
    held.append(f"{counts([layer.long_term for layer in layers])} long-term rows per layer")
    table = Table.grid(padding=(0, 2))
    table.add_row("read", f"{report.tokens:,} tokens: {report.chapters} chapters, {report.chunks:,} chunks")
    table.add_row(
        "written",
        f"{config['memory_tokens_per_chunk']} rows for up to {config['chunk_tokens']} tokens, in {len(layers)} layers",
    )
    table.add_row(
        "kept",
        ", ".join(held),
    )
    table.add_row("size", f"{size(report.bytes)}, room for more rows included")
    table.add_row(
        "positions",
        f"{places.layout}: a write takes up to {places.writing}, a read up to {places.reading} "
        f"of the {places.trained} it was trained with",
    )
    return table


def _speeds(report: DemoReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("\ntokens/s")
    for column in ("\nwith memory", "decoder\nalone", "\nratio"):
        table.add_column(column, justify="right")
    table.add_column("\nover the same")
    rows = max(layer.long_term for layer in report.layers)
    anew = f", scoring {rows:,} rows per layer for every chunk" if rows else ""
    for name, timing, remark in (("writing", report.write, ""), ("reading", report.read, anew)):
        speeds = timing.tokens_per_second, timing.base_tokens_per_second
        table.add_row(
            name,
            *(f"{speed:,.0f}" for speed in speeds),
            f"{speeds[0] / speeds[1]:.2f}",
            f"{timing.tokens:,} tokens{remark}",
        )
    return table


def _retrieved(report: DemoReport, console: Console) -> None:
    """Print which rows each layer brought back for the story, and from which chapters."""
    sources = report.story.sources
    if not sources:
        console.print("\nNothing was retrieved: all rows are still in short-term memory.")
        return
    per_row = report.config["chunk_tokens"] / report.config["memory_tokens_per_chunk"]
    console.print(f"\n[bold]Retrieved for the story[/] (age in rows written since; a row is {per_row:.0f} tokens)")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("layer", "rows", "youngest", "median", "oldest"):
        table.add_column(column, justify="right")
    for number, layer in enumerate(report.layers):
        ages = ["-" if age is None else f"{age:,}" for age in (layer.newest_age, layer.median_age, layer.oldest_age)]
        table.add_row(str(number), str(layer.retrieved), *ages)
    console.print(table, "")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column, justify in (("rows", "right"), ("from", "left"), ("youngest", "right"), ("oldest", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for entry in sources[:SOURCES]:
        ages = [f"{age:,}" for age in (entry.newest_age, entry.oldest_age)]
        table.add_row(str(entry.rows), escape(entry.source or "(no name)"), *ages)
    rest = sources[SOURCES:]
    if rest:
        table.add_row(str(sum(entry.rows for entry in rest)), f"{len(rest)} other chapters")
    console.print(table)


def _saved(report: DemoReport, kept: bool, console: Console) -> None:
    saved = report.saved
    verdict = "[green]yes[/]" if saved.identical else "[red]no[/]"
    same = sum(a == b for a, b in zip(saved.here.tokens, saved.in_new_process.tokens, strict=True))
    rows = "the same" if saved.here.births == saved.in_new_process.births else "other"
    console.print(
        f"\n[bold]Saved[/] ({size(saved.bytes)}) and loaded in a new process; both wrote the story and told on:"
    )
    for title, told in (("here", saved.here), ("new process", saved.in_new_process)):
        console.print(f"[dim]{title:>12}[/]  ... {escape(told.text.strip())}")
    console.print(
        f"identical continuation: [bold]{verdict}[/] "
        f"({same} of {len(saved.here.tokens)} tokens equal, {rows} rows in short-term memory)"
    )
    if kept:
        console.print(
            f"kept in {escape(saved.folder)}: mplus memory show {escape(saved.folder)}/memory", soft_wrap=True
        )
