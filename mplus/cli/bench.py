"""``mplus bench``: its commands, the options they share, and where a record goes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from attrs import define

if TYPE_CHECKING:
    import torch

    from mplus.bench.presets import Preset
    from mplus.bench.record import Record


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
LongTerm = Annotated[
    int | None, typer.Option("--long-term", min=1, help="So many long-term rows, with retriever keys of width 256.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: what the preset is for.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the record as JSON to this file.")]


@define(frozen=True)
class Bench:
    """The settings of every measurement.

    Attributes:
        preset, device: with what, and where.
        threads: of torch on the CPU, one section each.
        repeats: rounds.
        backends: of attention; None: those that are usual.
    """

    preset: Preset
    device: torch.device
    threads: list[int]
    repeats: int
    backends: list[str] | None = None

    @property
    def how(self) -> tuple[Preset, torch.device, list[int], int]:
        """Return preset, device, threads and repeats: the first arguments of ``measure`` functions."""
        return self.preset, self.device, self.threads, self.repeats


def measurement(
    *, backends: bool = True, long_term: bool = False
) -> Callable[[Callable[..., Record]], Callable[..., None]]:
    """Make a command of a function that takes a ``Bench`` and options of its own, and returns a record.

    The command has the options of every measurement besides. It writes the record and shows it; its exit code is 1
    when an arm computed something else than it should.

    Args:
        backends: let attention backends be named.
        long_term: let the number of long-term rows be set.
    """

    def command_of(measure: Callable[..., Record]) -> Callable[..., None]:
        shared = dict(inspect.signature(_shared, eval_str=True).parameters)
        as_json = shared.pop("as_json")
        for name, wanted in (("backends", backends), ("long_term", long_term)):
            if not wanted:
                del shared[name]
        # A record is a type for mypy only: its module imports torch.
        own = list(inspect.signature(measure, eval_str=True, locals={"Record": dict}).parameters.values())[1:]
        options = [*shared.values(), *own, as_json]

        def command(**given: Any) -> None:
            file = given.pop("as_json")
            bench = _prepared(**{name: given.pop(name) for name in shared})
            _finish(measure(bench, **given), file)

        command.__name__, command.__doc__ = measure.__name__, measure.__doc__
        command.__annotations__ = {option.name: option.annotation for option in options}
        # Typer makes the options of a command from its signature.
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
        )
        return command

    return command_of


def _shared(
    preset: PresetName = "cpu",
    threads: Threads = None,
    repeats: Repeats = None,
    backends: Backends = None,
    device: Device = None,
    long_term: LongTerm = None,
    as_json: Json = None,
) -> None:
    """Options of every measurement."""


def _prepared(
    preset: str,
    threads: str | None,
    repeats: int | None,
    device: str | None,
    backends: str | None = None,
    long_term: int | None = None,
) -> Bench:
    import torch
    from attrs import evolve

    from mplus.bench.presets import device_for
    from mplus.bench.presets import preset as find
    from mplus.errors import ConfigError

    chosen = find(preset)
    if long_term is not None:
        chosen = evolve(chosen, long_term_rows=long_term, retriever_width=256)
    counts = positive(threads, "--threads") or [torch.get_num_threads()]
    if len(set(counts)) < len(counts):
        raise ConfigError(f"--threads must be different numbers, got {threads!r}")
    names = None if backends is None else [part.strip() for part in backends.split(",")]
    return Bench(chosen, device_for(chosen, device), counts, repeats or chosen.repeats, names)


def positive(text: str | None, option: str) -> list[int] | None:
    """Parse ``1,2``; None where nothing was given. Raises ConfigError, which names ``option``."""
    from mplus.cli.eval_options import numbers
    from mplus.errors import ConfigError

    found = numbers(text, option)
    if found is None:
        return None
    if min(found) < 1:
        raise ConfigError(f"{option} must be numbers of at least 1, got {text!r}")
    return list(found)


def _finish(record: Record, as_json: Path | None) -> None:
    """Write and show a record; exit code 1 when an arm was wrong."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mplus.bench.record import failed
    from mplus.bench.tables import opening, refused, tables

    if as_json is not None:
        as_json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    console.print(escape(opening(record)), soft_wrap=True)
    for table in tables(record):
        shown = Table(box=None, title=escape(table.title), title_justify="left", title_style="bold")
        for column, head in enumerate(table.head):
            shown.add_column(escape(head), justify="left" if column == 0 else "right", no_wrap=column == 0)
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print()
        console.print(shown)
        for note in table.notes:
            console.print(escape(note), style="dim", soft_wrap=True)
    for line in refused(record):
        console.print(escape(line), soft_wrap=True)
    if failed(record):
        raise typer.Exit(1)


@measurement(long_term=True)
def read(
    bench: Bench,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens of the prompts; default: what the preset says.")
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also after 10,000 to 1,000,000 tokens were written.")
    ] = False,
) -> Record:
    """Time fresh reads of a prompt with a full memory, against three plain ways to do it.

    The floor: the decoder's layers over a prefix of ready keys and values, with nothing around them. hf_prefix: the
    decoder of transformers with such a prefix in its cache. published: the steps of the published code, all anew for
    every prompt. What computes something else than it should gets no speed; exit code 1 then.
    """
    from mplus.bench import read as reading

    return reading.measure(*bench.how, bench.backends, positive(lengths, "--lengths"), growth=growth)


@measurement()
def write(bench: Bench) -> Record:
    """Time writing a chunk to several memories, one by one and in a batch, against the bare forward over it."""
    from mplus.bench import write as writing

    return writing.measure(*bench.how, bench.backends)


@measurement()
def decode(bench: Bench) -> Record:
    """Time single tokens behind a prompt, with a cache that grows."""
    from mplus.bench import decode as decoding

    return decoding.measure(*bench.how, bench.backends)


@measurement(backends=False)
def score(bench: Bench) -> Record:
    """Time the retriever's scoring of long-term rows alone."""
    from mplus.bench import score as scoring

    return scoring.measure(*bench.how)


@measurement(backends=False)
def store(
    bench: Bench,
    name: Annotated[str, typer.Option("--store", help="Name of the store.")] = "ram",
    rows: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Rows of the layer; default: 10,000, 100,000 and 1,000,000.")
    ] = None,
) -> Record:
    """Time appending, evicting and merging a chunk's rows in one layer, while it is small and while it is large."""
    from mplus.bench import store as storing

    return storing.measure(*bench.how, name, positive(rows, "--rows"))


@measurement()
def attention(bench: Bench) -> Record:
    """Time the attention of one layer over memory and text alone: backends of mplus, and PyTorch's own ways.

    Backends get memory and text apart, as in a read; PyTorch's ways get them joined. The reference is among the
    backends unless others are named.
    """
    from mplus.bench import attention as attending

    return attending.measure(*bench.how, bench.backends)
