"""``mplus bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from mplus.bench.presets import Preset

PresetName = Annotated[
    str, typer.Option("--preset", help="Decoder and memory: cpu (4 layers of width 512) or llama3-8b (for a GPU).")
]
Threads = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="CPU threads for torch, one after the other; default: torch's own choice."),
]
Repeats = Annotated[int | None, typer.Option(min=1, help="Rounds; default: what the preset says.")]
Backends = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME,...", help="Attention backends of mplus; default: all but reference and flex."),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: what the preset is for.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the record as JSON to this file.")]


def read(
    preset: PresetName = "cpu",
    threads: Threads = None,
    repeats: Repeats = None,
    backends: Backends = None,
    device: Device = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens of the prompts; default: what the preset says.")
    ] = None,
    long_term: Annotated[
        int | None, typer.Option("--long-term", min=1, help="So many long-term rows, with retriever keys of width 256.")
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also after 10,000 to 1,000,000 tokens were written.")
    ] = False,
    as_json: Json = None,
) -> None:
    """Time fresh reads of a prompt with a full memory, against three plain ways to do it.

    The floor: the decoder's layers over a prefix of ready keys and values, with nothing around them. hf_prefix: the
    decoder of transformers with such a prefix in its cache. published: the steps of the published code, all anew for
    every prompt. What computes something else than it should gets no speed; exit code 1 then.
    """
    from mplus.bench import read as reading

    chosen, where, counts, rounds = _prepare(preset, device, threads, repeats, long_term)
    record = reading.measure(
        chosen, where, counts, rounds, _names(backends), _numbers(lengths, "--lengths"), growth=growth
    )
    _finish(record, as_json)


def write(
    preset: PresetName = "cpu",
    threads: Threads = None,
    repeats: Repeats = None,
    backends: Backends = None,
    device: Device = None,
    as_json: Json = None,
) -> None:
    """Time writing a chunk to several memories, one by one and in a batch, against the bare forward over it."""
    from mplus.bench import writing

    chosen, where, counts, rounds = _prepare(preset, device, threads, repeats)
    _finish(writing.measure(chosen, where, counts, rounds, _names(backends)), as_json)


def decode(
    preset: PresetName = "cpu",
    threads: Threads = None,
    repeats: Repeats = None,
    backends: Backends = None,
    device: Device = None,
    as_json: Json = None,
) -> None:
    """Time single tokens behind a prompt, with a cache that grows."""
    from mplus.bench import decode as decoding

    chosen, where, counts, rounds = _prepare(preset, device, threads, repeats)
    _finish(decoding.measure(chosen, where, counts, rounds, _names(backends)), as_json)


def score(
    preset: PresetName = "cpu",
    threads: Threads = None,
    repeats: Repeats = None,
    device: Device = None,
    as_json: Json = None,
) -> None:
    """Time the retriever's scoring of long-term rows alone."""
    from mplus.bench import scoring

    chosen, where, counts, rounds = _prepare(preset, device, threads, repeats)
    _finish(scoring.measure(chosen, where, counts, rounds), as_json)


def attention(
    preset: PresetName = "cpu",
    threads: Threads = None,
    repeats: Repeats = None,
    backends: Backends = None,
    device: Device = None,
    as_json: Json = None,
) -> None:
    """Time the attention of one layer over memory and text alone: backends of mplus, and PyTorch's own ways.

    Backends get memory and text apart, as in a read; PyTorch's ways get them joined. The reference is among the
    backends unless others are named.
    """
    from mplus.bench import attending

    chosen, where, counts, rounds = _prepare(preset, device, threads, repeats)
    _finish(attending.measure(chosen, where, counts, rounds, _names(backends)), as_json)


def store(
    preset: PresetName = "cpu",
    threads: Threads = None,
    repeats: Repeats = None,
    device: Device = None,
    name: Annotated[str, typer.Option("--store", help="Name of the store.")] = "ram",
    rows: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Rows of the layer; default: 10,000, 100,000 and 1,000,000.")
    ] = None,
    as_json: Json = None,
) -> None:
    """Time appending, evicting and merging a chunk's rows in one layer, while it is small and while it is large."""
    from mplus.bench import storing

    chosen, where, counts, rounds = _prepare(preset, device, threads, repeats)
    _finish(storing.measure(chosen, where, counts, rounds, name, _numbers(rows, "--rows")), as_json)


def _prepare(
    name: str, device: str | None, threads: str | None, repeats: int | None, long_term: int | None = None
) -> tuple[Preset, torch.device, list[int], int]:
    """Preset, device, numbers of threads and rounds."""
    import torch
    from attrs import evolve

    from mplus.bench.presets import device_for
    from mplus.bench.presets import preset as find
    from mplus.errors import ConfigError

    chosen = find(name)
    if long_term is not None:
        chosen = evolve(chosen, long_term_rows=long_term, retriever_width=256)
    counts = _numbers(threads, "--threads") or [torch.get_num_threads()]
    if len(set(counts)) < len(counts):
        raise ConfigError(f"--threads must be different numbers, got {threads!r}")
    return chosen, device_for(chosen, device), counts, repeats or chosen.repeats


def _numbers(text: str | None, option: str) -> list[int] | None:
    from mplus.cli.eval_common import numbers
    from mplus.errors import ConfigError

    found = numbers(text, option)
    if found is None:
        return None
    if min(found) < 1:
        raise ConfigError(f"{option} must be numbers of at least 1, got {text!r}")
    return list(found)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _finish(record: Mapping[str, Any], as_json: Path | None) -> None:
    """Write and show a record; exit code 1 when an arm was wrong."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mplus.bench.record import failed
    from mplus.bench.tables import opening, refused, sheets

    if as_json is not None:
        as_json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    console.print(escape(opening(record)), soft_wrap=True)
    for sheet in sheets(record):
        table = Table(box=None, title=escape(sheet.title), title_justify="left", title_style="bold")
        for place, head in enumerate(sheet.head):
            table.add_column(escape(head), justify="left" if place == 0 else "right", no_wrap=place == 0)
        for row in sheet.rows:
            table.add_row(*map(escape, row))
        console.print()
        console.print(table)
        for note in sheet.notes:
            console.print(escape(note), style="dim", soft_wrap=True)
    for line in refused(record):
        console.print(escape(line), soft_wrap=True)
    if failed(record):
        raise typer.Exit(1)
