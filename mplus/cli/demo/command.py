"""``mplus demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mplus.cli.output import print_json

Threads = Annotated[int, typer.Option(min=1, help="CPU threads for torch.")]


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
    import time

    started = time.perf_counter()
    import torch

    from mplus.cli.demo.conversation import converse
    from mplus.cli.demo.recall import run
    from mplus.cli.demo.recall_render import check_figure, save_figure, show

    check_figure(plot)  # before the work, not after it
    torch.set_num_threads(threads)
    report, conversation = run(
        train=train, facts=facts, distraction=distraction, streams=streams, seed=seed, threads=threads, quiet=as_json
    )
    figure = save_figure(report, plot)
    report.seconds = time.perf_counter() - started
    print_json(report.plain()) if as_json else show(report, figure)
    if talk or (talk is None and not as_json and sys.stdin.isatty()):
        converse(conversation)
