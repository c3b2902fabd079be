"""``mplus memory``: show, sources, forget, expire, pin, unpin, text, rewrite, verify and repair."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplus.cli.output import counts, print_json, size
from mplus.config import JsonValue

if TYPE_CHECKING:
    from attrs import Attribute
    from rich.table import Table

    from mplus.memory.directory.checkpoint_manifest import LiveManifest
    from mplus.memory.directory.offline import DirectoryInfo
    from mplus.memory.format.manifest import Manifest
    from mplus.memory.report import SourceInfo
    from mplus.memory.sources.table import SourceTable


Kept = Annotated[Path, typer.Argument(help="Folder written by Memory.save or Memory.open.", show_default=False)]
Named = Annotated[str | None, typer.Argument(help="Name that was given to write.", show_default=False)]
Unnamed = Annotated[bool, typer.Option("--unnamed", help="What was written without a name.")]
Stream = Annotated[int | None, typer.Option(help="In this stream only.", show_default="all")]
Out = Annotated[Path, typer.Argument(help="Folder for what is sound; empty or new.", show_default=False)]


def show(
    path: Kept,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON instead.")] = False,
) -> None:
    """Show what a memory on disk holds and which decoder it belongs to.

    Of a saved memory only the manifest and the names of sources are read. Of one that lives in a directory, short-term
    rows and the journal are read too, beside whoever writes there.
    """
    import attrs
    from rich.console import Console

    from mplus.memory.directory.offline import read_info
    from mplus.memory.format.entries import state_class
    from mplus.memory.format.manifest import LIVE_FORMAT, is_memory
    from mplus.memory.format.offline import saved_tables

    if is_memory(path, LIVE_FORMAT):
        held = read_info(path)
        facts, table, streams, tables = _live_facts(held), _live_decoder(held), held.manifest.streams, held.sources
    else:
        manifest, tables = saved_tables(path)
        facts, table, streams = _facts(manifest), _decoder(manifest), manifest.streams
    if as_json:
        shown = [
            {**one, **one.pop("rows"), "sources": [attrs.asdict(source) for source in sources]}
            for one, sources in zip(map(attrs.asdict, streams), tables, strict=True)
        ]
        print_json({**facts, "streams": shown})
        return
    console = Console(highlight=False)
    console.print(table)
    for number, (stream, sources) in enumerate(zip(streams, tables, strict=True)):
        tiers = [
            f"{counts(held)} {state_class(stream.mechanism).lists.get(name, name)}"
            for name, held in stream.rows.items()
        ]
        rows = ", ".join([*tiers, f"{counts(stream.ltm)} long-term"])
        console.print(f"\nstream {number}: {rows} rows per layer, {stream.clock:,} written", soft_wrap=True)
        console.print(_sources(sources))


def verify(path: Kept) -> None:
    """Read every byte of a memory on disk and check it against its checksums. Exit code 1: there are faults."""
    from mplus.memory.format.manifest import LIVE_FORMAT, is_memory, read_manifest
    from mplus.memory.format.verify import verify as faults_of

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
    from mplus.memory.format.repair import repair as saved

    lost = saved(path, out)
    for part in lost:
        print(f"lost: {part}", file=sys.stderr)
    print(f"{out} holds {'what was sound of' if lost else 'all of'} {path}: Memory.load reads it")
    if lost:
        raise typer.Exit(1)


def _facts(manifest: Manifest) -> dict[str, JsonValue]:
    """Return everything but the list of tensors."""
    from mplus.memory.format.structure import unstructured

    plain = unstructured(manifest)
    plain["data"]["tensors"] = len(manifest.data.tensors)
    return plain


def _live_facts(held: DirectoryInfo) -> dict[str, JsonValue]:
    """Return the manifest, with the streams as they are now, and what it does not say."""
    from mplus.memory.format.structure import unstructured

    plain = unstructured(held.manifest)
    plain["journal"] = {"file": held.manifest.journal, "bytes": held.journal_bytes, "records": held.records}
    return {**plain, "bytes": held.disk_bytes, "ram_bytes": held.ram_bytes, "texts_kept": held.texts_kept}


def _live_decoder(held: DirectoryInfo) -> Table:
    """Return the table of ``_decoder`` for a memory in a directory."""
    manifest = held.manifest
    extent = f"{size(held.disk_bytes)} in {len(manifest.files)} files, {size(held.ram_bytes)} in RAM once it is open"
    table = _heading(manifest, extent)
    table.add_row("journal", f"{held.records:,} records since the last checkpoint, {size(held.journal_bytes)}")
    if manifest.bytes_budget is not None:
        table.add_row("budget", size(manifest.bytes_budget))
    table.add_row("texts", "kept" if held.texts_kept else "not kept")
    return _with_fingerprint(table, manifest)


def _decoder(manifest: Manifest) -> Table:
    """Return a table of the memory's form and of the decoder that it belongs to."""
    table = _heading(manifest, f"{size(manifest.data.bytes)} in {manifest.data.file}")
    if manifest.capacity is not None:
        budget = "" if manifest.bytes_budget is None else f" (budget {size(manifest.bytes_budget)})"
        texts = f", the rows of {manifest.text_capacity:,} text tokens" if manifest.text_capacity is not None else ""
        table.add_row("capacity", f"{manifest.capacity:,} long-term rows per layer{texts}{budget}")
    kept = any(name.startswith("stream.") and ".text." in name for name in manifest.data.tensors)
    table.add_row("texts", "kept" if kept else "not kept")
    return _with_fingerprint(table, manifest)


def _heading(manifest: Manifest | LiveManifest, extent: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    layout = manifest.layout
    keys = f", retriever keys of width {layout.key_size}" if layout.key_size else ""
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("written by", f"mplus {manifest.written_by}")
    table.add_row("size", extent)
    table.add_row("rows", f"{layout.layers} layers of width {layout.hidden_size}{keys}, {layout.dtype}")
    table.add_row("eviction", escape(str(manifest.eviction)))
    return table


def _with_fingerprint(table: Table, manifest: Manifest | LiveManifest) -> Table:
    from rich.markup import escape

    for name, value in manifest.fingerprint.items():
        if name not in {"layers", "hidden_size", "key_size"}:  # said already
            table.add_row(f"decoder: {name}", escape(str(value)))
    return table


def _sources(sources: SourceTable) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column("source")
    table.add_column("tokens", justify="right")
    table.add_column("chunks", justify="right")
    for source in sources:
        if source.is_written:
            table.add_row(escape(source.name or "(no name)"), f"{source.tokens:,}", f"{source.chunks:,}")
        else:
            table.add_row(escape(source.name or "(no name)"), "forgotten", "")
    return table


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
        print_json([[attrs.asdict(source, value_serializer=_plain) for source in stream] for stream in streams])
        return
    console = Console(highlight=False)
    for number, stream in enumerate(streams):
        console.print(f"stream {number}")
        console.print(_table(stream))


def _plain(instance: type, field: Attribute[JsonValue], value: datetime | JsonValue) -> JsonValue:
    """Return a time as text of ISO 8601, and all else as it is."""
    return value.isoformat() if isinstance(value, datetime) else value


def forget(
    path: Kept,
    source: Named = None,
    unnamed: Unnamed = False,
    keep_name: Annotated[bool, typer.Option("--keep-name", help="Keep the name, listed as forgotten.")] = False,
    stream: Stream = None,
) -> None:
    """Rewrite a memory on disk without the rows, kept texts and name of one source.

    Rows written later may still carry traces of it. Other copies of the memory stay as they are. A directory that is
    open for writing is refused.
    """
    from mplus.memory.format.offline import forget_saved

    report = forget_saved(path, _source(source, unnamed=unnamed), stream, keep_name=keep_name)
    print(
        f"forgot {_named(source)}: {report.tokens:,} tokens in {report.chunks:,} chunks; of its rows, per layer: "
        + ", ".join(f"{counts(rows)} {name}" for name, rows in report.held.items())
    )


def expire(
    path: Kept,
    now: Annotated[
        datetime | None, typer.Option(help="Time to go by, in UTC where it says nothing else.", show_default="now")
    ] = None,
) -> None:
    """Rewrite a memory on disk without the sources whose time has come (``write(..., expires=)``)."""
    from mplus.memory.format.offline import expire_saved

    time = datetime.now(UTC) if now is None else now if now.tzinfo else now.replace(tzinfo=UTC)
    reports = expire_saved(path, time.timestamp())
    for report in reports:
        print(f"forgot {_named(report.source)}: {report.tokens:,} tokens in {report.chunks:,} chunks")
    if not reports:
        print("nothing has expired")


def pin(path: Kept, source: Named = None, unnamed: Unnamed = False, stream: Stream = None) -> None:
    """Keep the rows of a source from eviction, in a memory on disk."""
    from mplus.memory.format.offline import pin_saved

    pin_saved(path, _source(source, unnamed=unnamed), stream, pinned=True)
    print(f"pinned {_named(source)}")


def unpin(path: Kept, source: Named = None, unnamed: Unnamed = False, stream: Stream = None) -> None:
    """Let the rows of a source leave again as the eviction policy says, in a memory on disk."""
    from mplus.memory.format.offline import pin_saved

    pin_saved(path, _source(source, unnamed=unnamed), stream, pinned=False)
    print(f"unpinned {_named(source)}")


def text(
    path: Kept,
    source: Named = None,
    unnamed: Unnamed = False,
    stream: Annotated[int, typer.Option(help="Stream that it was written to.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or name of the decoder's tokenizer; memories of text need none.", show_default=False),
    ] = None,
) -> None:
    """Print what was written from a source, where a memory on disk keeps its words or ids."""
    from mplus.memory.format.offline import saved_text

    known = None
    if tokenizer is not None:
        from mplus.hf.decoders.train_model import load_tokenizer

        known = load_tokenizer(tokenizer)
    print(saved_text(path, _source(source, unnamed=unnamed), stream, known))


def rewrite(
    old: Kept,
    new: Annotated[Path, typer.Argument(help="Folder for the new memory; empty or new.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="Folder or name of the decoder that is to read it; smollm2: the one of `get`.")
    ],
    mechanism: Annotated[
        str | None, typer.Option(help="Kind of memory, where MODEL was saved without one.", show_default="as OLD")
    ] = None,
    old_tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or name of the tokenizer that OLD was written with.", show_default="that of MODEL"),
    ] = None,
) -> None:
    """Make a memory anew for another decoder or tokenizer, from the text that it keeps, and leave the old one alone.

    OLD does not say which tokenizer its ids are of: --old-tokenizer is needed unless it was written with MODEL itself.
    Where MODEL has the same tokenizer and other weights, give MODEL for both. NEW is there when all is written; until
    then it is in NEW.rewriting, with which a further call goes on.
    """
    from mplus.hf.decoders.train_model import load_tokenizer
    from mplus.hf.pretrained.chat_model import load_chat_model, with_memory
    from mplus.memory.migration.kept import read_kept
    from mplus.memory.migration.rewrite import rewrite_memory

    kept = read_kept(old)
    decoder, tokenizer = load_chat_model(model)
    wrapped = with_memory(decoder, mechanism or (None if hasattr(decoder, "mplus_engine") else kept.mechanism))
    before = tokenizer if old_tokenizer == model else None
    if old_tokenizer is not None and before is None:
        before = load_tokenizer(old_tokenizer)
    memory = rewrite_memory(old, wrapped, new, tokenizer=tokenizer, old_tokenizer=before)
    try:
        found = [source for row in range(memory.batch_size) for source in memory.sources(row)]
    finally:
        memory.streams.close()
    tokens = sum(source.tokens for source in found)
    print(f"{new} holds {tokens:,} tokens of {len(found):,} sources, written anew for {model}; {old} is as it was")


def _source(source: str | None, *, unnamed: bool) -> str | None:
    """Return the name of a source. Raises InputError unless there is one, or else ``unnamed``."""
    from mplus.errors import InputError

    if unnamed == (source is not None):
        raise InputError(f"give the name of a source or --unnamed, got {source!r} and unnamed={unnamed}")
    return source


def _named(source: str | None) -> str:
    return "text without a name" if source is None else repr(source)


def _table(stream: list[SourceInfo]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column("source")
    names = list(stream[0].held) if stream else []
    marked = any(source.expires or source.pinned for source in stream)
    waits = any(source.tail_tokens for source in stream)
    for title in (
        "tokens",
        *(["waiting"] if waits else []),
        "chunks",
        *names,
        "age in rows",
        "in chunks",
        "last written",
    ):
        table.add_column(title, justify="right")
    if marked:
        table.add_column("expires")
    for source in stream:
        table.add_row(
            escape(source.name or "(no name)"),
            f"{source.tokens:,}",
            *([f"{source.tail_tokens:,}"] if waits else []),
            f"{source.chunks:,}",
            *(f"{count:,.1f}" for count in source.held.values()),
            _span(source.newest_age, source.oldest_age),
            _span(source.newest_age_chunks, source.oldest_age_chunks),
            *_times(source, marked=marked),
        )
    return table


def _times(source: SourceInfo, *, marked: bool) -> Iterator[str]:
    """Yield when a source was last written and, where any is ``marked``, when it expires and whether it is pinned."""
    yield f"{source.last_written:%Y-%m-%d %H:%M}" if source.last_written else ""
    if marked:
        expires = f"{source.expires:%Y-%m-%d %H:%M}" if source.expires else ""
        yield f"{expires} (pinned)".strip() if source.pinned else expires


def _span(latest: int | None, oldest: int | None) -> str:
    return "" if latest is None or oldest is None else counts([latest, oldest])
