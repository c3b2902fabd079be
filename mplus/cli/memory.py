"""``mplus memory show``, ``mplus memory verify`` and ``mplus memory repair``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplus.cli.output import counts, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from mplus.memory.manifest import Manifest, StreamEntry

Saved = Annotated[Path, typer.Argument(help="Folder written by Memory.save.", show_default=False)]
Kept = Annotated[Path, typer.Argument(help="Folder written by Memory.save or Memory.open.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Folder for what is sound; empty or new.", show_default=False)]


def show(
    path: Saved,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON instead.")] = False,
) -> None:
    """Show what a saved memory holds and which decoder it belongs to, without loading its rows."""
    from rich.console import Console

    from mplus.memory.manifest import read_manifest

    manifest = read_manifest(path)
    if as_json:
        print_json(_facts(manifest))
        return
    console = Console(highlight=False)
    console.print(_decoder(manifest))
    for number, stream in enumerate(manifest.streams):
        rows = f"{counts(stream.stm)} short-term, {counts(stream.pending)} pending, {counts(stream.ltm)} long-term"
        console.print(f"\nstream {number}: {rows} rows per layer, {stream.clock:,} written", soft_wrap=True)
        console.print(_sources(stream))


def verify(path: Kept) -> None:
    """Read every byte of a memory on disk and check it against its checksums. Exit code 1: there are faults."""
    from mplus.memory.manifest import LIVE_FORMAT, is_memory, read_manifest
    from mplus.memory.verify import verify as faults_of

    faults = faults_of(path)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        print(f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}", file=sys.stderr)
        raise typer.Exit(1)
    if is_memory(path, LIVE_FORMAT):
        print(f"{path} is sound: all checksums match")
        return
    data = read_manifest(path).data
    print(f"{path} is sound: {len(data.tensors):,} tensors, {size(data.bytes)}, all checksums match")


def repair(path: Kept, out: Out) -> None:
    """Save what is sound of a damaged memory as a new one. Exit code 1: something was lost, and is listed."""
    from mplus.memory.repair import repair as saved

    lost = saved(path, out)
    for part in lost:
        print(f"lost: {part}", file=sys.stderr)
    print(f"{out} holds {'what was sound of' if lost else 'all of'} {path}: Memory.load reads it")
    if lost:
        raise typer.Exit(1)


def _facts(manifest: Manifest) -> dict[str, object]:
    """Everything but the list of tensors."""
    import attrs

    plain = attrs.asdict(manifest)
    plain["data"]["tensors"] = len(manifest.data.tensors)
    return plain


def _decoder(manifest: Manifest) -> Table:
    """What the memory is made of, and what its decoder must be."""
    from rich.markup import escape
    from rich.table import Table

    layout = manifest.layout
    keys = f", retriever keys of width {layout.key_size}" if layout.key_size else ""
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("written by", f"mplus {manifest.written_by}")
    table.add_row("size", f"{size(manifest.data.bytes)} in {manifest.data.file}")
    table.add_row("rows", f"{layout.layers} layers of width {layout.hidden_size}{keys}, {layout.dtype}")
    table.add_row("eviction", escape(str(manifest.eviction)))
    if manifest.capacity is not None:
        budget = "" if manifest.bytes_budget is None else f" (budget {size(manifest.bytes_budget)})"
        texts = f", the rows of {manifest.text_capacity:,} text tokens" if manifest.text_capacity is not None else ""
        table.add_row("capacity", f"{manifest.capacity:,} long-term rows per layer{texts}{budget}")
    kept = any(name.startswith("stream.") and ".text." in name for name in manifest.data.tensors)
    table.add_row("texts", "kept" if kept else "not kept")
    for name, value in manifest.fingerprint.items():
        if name not in {"layers", "hidden_size", "key_size"}:  # said already
            table.add_row(f"decoder: {name}", escape(str(value)))
    return table


def _sources(stream: StreamEntry) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column("source")
    table.add_column("tokens", justify="right")
    table.add_column("chunks", justify="right")
    for source in stream.sources:
        if source.chunks:
            table.add_row(escape(source.name or "(no name)"), f"{source.tokens:,}", f"{source.chunks:,}")
    return table
