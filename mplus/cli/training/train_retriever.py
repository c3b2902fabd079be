"""``mplus train-retriever``: train which chunks of memory come back for a question, for any decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

import typer

from mplus.cli.get import need_smollm2
from mplus.cli.output import print_json


def train_retriever(
    model: Annotated[str, typer.Argument(help="Chat model: smollm2, a folder, or a name on the Hub.")] = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A file of plain text, .gz too, as memories will be of. May be given several times."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help='JSON lines, {"question": ..., "passage": ...}, to train on as well.', show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the maps, a report, and the hidden states.")] = Path(
        "retriever"
    ),
    passages: Annotated[int, typer.Option(min=1, help="Passages of all texts together, at most.")] = 1000,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the decoder that are compared.")] = 3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the maps.")] = 64,
    steps: Annotated[int, typer.Option(min=0, help="Steps at most.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn in the fit.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for torch.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a retriever of chunks for a decoder from plain texts, and say whether it finds more than hybrid does.

    Sentences are cropped out of passages; the rest of its passage is the right one for each. The decoder reads all
    once, which takes most of the time; a run that was stopped goes on with what it had read. The last tenth of every
    text is kept for the report. A config uses it as retriever = {name = "hybrid", path = "OUT/maps.safetensors"}.
    """
    import torch

    from mplus.errors import InputError
    from mplus.hf.pretrained.chat_model import SMOLLM2, load_chat_model, with_memory
    from mplus.training.chunk_retriever import FitOptions, train_chunk_retriever

    if not text and questions is None:
        raise InputError("something to train on must be given: --text FILE, --questions FILE, or both")
    if threads is not None:
        torch.set_num_threads(threads)
    if model == SMOLLM2:
        need_smollm2()
    decoder, tokenizer = load_chat_model(model)
    with _Bars() as bars:
        report = train_chunk_retriever(
            with_memory(decoder),
            tokenizer,
            text or [],
            out,
            questions=questions,
            passages=passages,
            options=FitOptions(layers=layers, rank=rank, steps=steps, seed=seed),
            step=bars.step,
        )
    print_json(report) if as_json else _show(report, out)


class _Bars:
    """Bars on stderr, one for each thing that is done, with the time that is left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def step(self, what: str, done: int, of: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=of)
        self._bars.advance(self._tasks[what], done)


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    recall, console = report["recall"], Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{recall['queries']} queries among {recall['passages']} passages that it was not trained on")
    for column in ("retriever", "right first", "among 4", "first, over hybrid"):
        table.add_column(column)
    for name, found in recall.items():
        if isinstance(found, dict):
            over = found.get("over_hybrid_at_1")
            shown = "" if over is None else f"{over['value']:+.3f} [{over['low']:+.3f}, {over['high']:+.3f}]"
            table.add_row(name, f"{found['recall_at_1']:.3f}", f"{found['recall_at_4']:.3f}", shown)
    console.print(table)
    over = recall["hybrid with trained"]["over_hybrid_at_1"]
    better, worse = over["low"] > 0, over["high"] < 0
    what = "finds more than" if better else "finds less than" if worse else "cannot be told from"
    console.print(f"hybrid with these maps {what} hybrid without them")
    console.print(f"wrote {out / 'maps.safetensors'}")
