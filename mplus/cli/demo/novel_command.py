"""``mplus demo-novel``."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import attrs
import typer

from mplus.cli.output import print_json

FEWEST_TOKENS = 512

Threads = Annotated[
    int, typer.Option(min=1, help="CPU threads for torch. So small a decoder is slower with more than one.")
]


def demo_novel(
    tokens: Annotated[
        int | None, typer.Option(min=FEWEST_TOKENS, help="Read only so many tokens of the novel, not all of it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    threads: Threads = 1,
    out: Annotated[Path | None, typer.Option(help="Keep the saved decoder and memory in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead.")] = False,
) -> None:
    """Read a novel into the memory of a small decoder, tell a story with it, save it, and go on in a new process.

    Decoder and novel come with the package; nothing is downloaded. Exit code 1: the new process told something else.
    """
    import time

    started = time.perf_counter()
    import torch

    from mplus.cli.demo.novel import run, tokenize
    from mplus.cli.demo.novel_text import chapters
    from mplus.cli.demo.render import show
    from mplus.cli.demo.resume import MEMORY
    from mplus.hf.pretrained.load import without_bars
    from mplus.hf.pretrained.shipped import load_tokenizer
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
    print_json(report.plain()) if as_json else show(report, kept=out is not None)
    if not report.saved.identical:
        raise typer.Exit(1)


def demo_continue(folder: Path, threads: Threads = 1) -> None:
    """Go on with what ``mplus demo-novel --out FOLDER`` saved, and print what was told as JSON."""
    import torch

    from mplus.cli.demo.resume import continue_saved

    torch.set_num_threads(threads)
    print(json.dumps(attrs.asdict(continue_saved(folder))))
