"""The demo's report on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mplus.cli.demo.report import DemoReport
from mplus.cli.output import counts, size

SOURCES = 8
"""Sources listed by name; the rest are counted."""

NOT_TRAINED = (
    "this decoder has not yet been trained to use its memory. Its retriever has random weights, so it does not choose "
    "rows for what they say, and that memory changes the story does not mean that it helps. What works is everything "
    "around it: writing, keeping, retrieving, reading, saving."
)


def show(report: DemoReport, kept: bool, console: Console | None = None) -> None:
    """Print a report; ``kept``: what it saved stays on disk."""
    console = console if console is not None else Console(highlight=False)
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    console.print(f"\n[bold]{report.novel}[/]")
    console.print(
        f"read by stories260K, a decoder of {report.parameters:,} parameters (CPU, {threads}, seed {report.seed})\n"
    )
    console.print(_kept(report), "")
    console.print(_speeds(report))
    _retrieved(report, console)
    _story(report, console)
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
    """Which rows each layer brought back for the story, and from which chapters."""
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


def _story(report: DemoReport, console: Console) -> None:
    console.print(f"\n[bold]{escape(report.story.prompt)} ...[/]")
    for title, text in (("with memory", report.story.with_memory), ("without", report.story.without_memory)):
        console.print(f"[dim]{title:>12}[/]  ... {escape(text.strip())}")


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
