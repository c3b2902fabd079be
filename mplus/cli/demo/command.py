"""``mplus demo`` and ``mplus demo-novel``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import attrs
import typer

from mplus.cli.output import print_json

FEWEST_TOKENS = 512

Threads = Annotated[int, typer.Option(min=1, help="CPU threads for torch.")]
NovelThreads = Annotated[
    int, typer.Option(min=1, help="CPU threads for torch. So small a decoder is slower with more than one.")
]


def demo(
    train: Annotated[
        bool, typer.Option("--train", help="Train the decoder here, in minutes, not use the one shipped.")
    ] = False,
    facts: Annotated[int, typer.Option(min=1, max=32, help="Facts told first and asked for at the end.")] = 8,
    distraction: Annotated[
        int, typer.Option(min=0, max=5000, help="Chunks told in between, each with a fact of its own.")
    ] = 128,
    streams: Annotated[int, typer.Option(min=1, help="Memories that the curves are measured on.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    threads: Threads = 2,
    plot: Annotated[Path, typer.Option(help="Where the figure goes (.png or .svg).")] = Path("mplus-demo.png"),
    talk: Annotated[
        bool | None, typer.Option(help="Afterwards, tell it facts and ask; default: in a terminal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON instead.")] = False,
) -> None:
    """Tell a small decoder facts, tell it many more, ask for the first, and draw how well each way of remembering does.

    The decoder was trained in minutes on a CPU and comes with the package; nothing is downloaded.
    """
    started = time.perf_counter()
    import torch

    from mplus.cli.demo.recall import converse, run
    from mplus.cli.demo.render import check_figure, save_figure, show_recall

    check_figure(plot)  # before the work, not after it
    torch.set_num_threads(threads)
    report, chat = run(
        train=train, facts=facts, distraction=distraction, streams=streams, seed=seed, threads=threads, quiet=as_json
    )
    figure = save_figure(report, plot)
    report.seconds = time.perf_counter() - started
    print_json(report.plain()) if as_json else show_recall(report, figure)
    if talk or (talk is None and not as_json and sys.stdin.isatty()):
        converse(chat)


def demo_novel(
    tokens: Annotated[
        int | None, typer.Option(min=FEWEST_TOKENS, help="Read only so many tokens of the novel, not all of it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    threads: NovelThreads = 1,
    out: Annotated[Path | None, typer.Option(help="Keep the saved decoder and memory in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead.")] = False,
) -> None:
    """Read a novel into the memory of a small decoder, tell a story with it, save it, and go on in a new process.

    Decoder and novel come with the package; nothing is downloaded. Exit code 1: the new process told something else.
    """
    started = time.perf_counter()
    import torch

    from mplus.cli.demo.novel import MEMORY, run, tokenize
    from mplus.cli.demo.render import show_novel
    from mplus.hf.pretrained.load import without_bars
    from mplus.hf.pretrained.shipped import chapters, load_tokenizer
    from mplus.memory.format.folder import prepare
    from mplus.memory.format.save import check_place

    torch.set_num_threads(threads)
    if out is not None:  # a folder that cannot take the memory is found out before the work, not after it
        check_place(prepare(out / MEMORY))
    tokenizer = load_tokenizer()
    texts = tokenize(chapters(), tokenizer, tokens)
    folder: Any = tempfile.TemporaryDirectory(prefix="mplus-demo-") if out is None else nullcontext(str(out))
    with without_bars(), folder as name:
        report = run(texts, tokenizer, seed=seed, threads=threads, folder=Path(name))
    report = attrs.evolve(report, seconds=time.perf_counter() - started)
    print_json(report.plain()) if as_json else show_novel(report, kept=out is not None)
    if not report.saved.identical:
        raise typer.Exit(1)


def demo_continue(folder: Path, threads: NovelThreads = 1) -> None:
    """Go on with what ``mplus demo-novel --out FOLDER`` saved, and print what was told as JSON."""
    import torch

    from mplus.cli.demo.novel import continue_saved

    torch.set_num_threads(threads)
    print(json.dumps(attrs.asdict(continue_saved(folder))))
