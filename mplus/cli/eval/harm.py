"""``mplus eval harm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mplus.cli.eval.options import Device, Dtype, Json, Model, Seed, Threads, Tokenizer, prepare, show_plain


def harm(
    model: Model,
    text: Annotated[Path, typer.Option(help="Held-out text to predict (.txt or .gz).", show_default=False)],
    unrelated: Annotated[
        Path, typer.Option(help="Text from elsewhere that is written into memory (.txt or .gz).", show_default=False)
    ],
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each piece of held-out text.")] = 256,
    known_tokens: Annotated[
        int, typer.Option(min=1, help="Of them, read but not predicted; retrieval sees these alone.")
    ] = 16,
    pieces: Annotated[int, typer.Option(min=1, help="Most pieces.")] = 64,
    unrelated_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to write; default: as many as fill the memory.")
    ] = None,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = None,
) -> None:
    """Perplexity without memory, with an empty one, and with one full of unrelated text: what carrying it costs."""
    from mplus.evaluation.harm import HarmOptions
    from mplus.evaluation.harm import harm as run
    from mplus.evaluation.texts import read

    decoder, words = prepare(model, tokenizer, device, dtype, threads)
    options = HarmOptions(
        text_tokens=text_tokens,
        known_tokens=known_tokens,
        pieces=pieces,
        unrelated_tokens=unrelated_tokens,
        bos=getattr(words, "bos_token_id", None),
        seed=seed,
    )
    show_plain(run(decoder, words, read(text), read(unrelated), options=options, name=model.name), as_json)
