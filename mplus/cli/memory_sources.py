"""``mplus memory sources`` and ``mplus memory forget``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplus.cli.memory import Kept
from mplus.cli.output import counts, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from mplus.memory.report import SourceInfo


def sources(
    path: Kept,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON instead.")] = False,
) -> None:
    """List what a memory on disk was written from: text tokens, rows still held, and how old these are."""
    import attrs
    from rich.console import Console

    from mplus.memory.format.offline import saved_sources

    streams = saved_sources(path)
    if as_json:
        print_json([[attrs.asdict(source) for source in stream] for stream in streams])
        return
    console = Console(highlight=False)
    for number, stream in enumerate(streams):
        console.print(f"stream {number}")
        console.print(_table(stream))


def forget(
    path: Kept,
    source: Annotated[str | None, typer.Argument(help="Name that was given to write.", show_default=False)] = None,
    unnamed: Annotated[bool, typer.Option("--unnamed", help="Forget what was written without a name.")] = False,
    keep_name: Annotated[bool, typer.Option("--keep-name", help="Keep the name, listed as forgotten.")] = False,
    stream: Annotated[int | None, typer.Option(help="Forget it in this stream only.", show_default="all")] = None,
) -> None:
    """Rewrite a memory on disk without the rows, kept texts and name of one source.

    Rows written later may still carry traces of it. Other copies of the memory stay as they are. A directory that is
    open for writing is refused.
    """
    from mplus.errors import InputError
    from mplus.memory.format.offline import forget_saved

    if unnamed == (source is not None):
        raise InputError(f"give the name of a source or --unnamed, got {source!r} and unnamed={unnamed}")
    report = forget_saved(path, source, stream, keep_name=keep_name)
    print(
        f"forgot {'text without a name' if source is None else repr(source)}: {report.tokens:,} tokens in "
        f"{report.chunks:,} chunks; of its rows, per layer: "
        + ", ".join(f"{counts(rows)} {name}" for name, rows in report.held.items())
    )


def _table(stream: list[SourceInfo]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column("source")
    names = list(stream[0].held) if stream else []
    for title in ("tokens", "chunks", *names, "age in rows", "in chunks"):
        table.add_column(title, justify="right")
    for source in stream:
        table.add_row(
            escape(source.name or "(no name)"),
            f"{source.tokens:,}",
            f"{source.chunks:,}",
            *(f"{count:,.1f}" for count in source.held.values()),
            _span(source.newest_age, source.oldest_age),
            _span(source.newest_age_chunks, source.oldest_age_chunks),
        )
    return table


def _span(latest: Any, oldest: Any) -> str:
    return "" if latest is None else counts([latest, oldest])
