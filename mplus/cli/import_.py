"""``mplus import``: turns a published M+ or MemoryLLM checkpoint into a model and a memory of this library."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

    from mplus.interop.published import PublishedCheckpoint

MEMORY = "memory"
"""Subfolder of the output that holds the memory."""
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def import_checkpoint(
    path: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not hold anything yet.", show_default=False)],
    dtype: Annotated[
        Literal["stored", "float32", "float16", "bfloat16"], typer.Option(help="Numbers to store.")
    ] = "stored",
    rope_inv_freq_dtype: Annotated[
        Literal["default", "none", "bfloat16", "float16"],
        typer.Option(help="Round rotary frequencies to this; default: bfloat16 for M+, none for MemoryLLM."),
    ] = "default",
) -> None:
    """Import a published M+ or MemoryLLM checkpoint.

    Writes the decoder with everything added to it to OUT (read it with mplus.from_pretrained), its memory to OUT/memory
    (read it with mplus.Memory.load), and copies the tokenizer where PATH has one.
    """
    import torch
    from rich.console import Console

    from mplus.errors import CheckpointError
    from mplus.interop.published import PublishedCheckpoint

    console = Console()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} must be an empty folder or not exist yet: nothing is overwritten")
    checkpoint = PublishedCheckpoint.open(path)
    for name, value in found(checkpoint).items():
        console.print(f"{name:<20} {value}", highlight=False)
    rope: Any = None if rope_inv_freq_dtype == "none" else rope_inv_freq_dtype
    with console.status("loading"):
        model, memory = checkpoint.load(
            dtype=None if dtype == "stored" else getattr(torch, dtype), rope_inv_freq_dtype=rope
        )
    with console.status("writing"):
        model.save_pretrained(out, save_base=True)
        memory.save(out / MEMORY)
        for name in TOKENIZER:
            if (path / name).is_file():
                shutil.copyfile(path / name, out / name)
    console.print(f"wrote {out} and {out / MEMORY} ({memory!r})", highlight=False, soft_wrap=True)


def found(checkpoint: PublishedCheckpoint) -> dict[str, str]:
    """Describe what a checkpoint holds, for people."""
    config, adapters = checkpoint.config, checkpoint.config.adapters
    facts = {
        "kind": "M+" if config.kind == "mplus" else "MemoryLLM",
        "decoder": f"Llama, {config.layers} layers of width {config.hidden_size}, stored as {_plain(checkpoint.dtype)}",
        "adapters": f"LoRA of rank {adapters.rank}, alpha {adapters.alpha:g}, "
        + ("one for writing and reading" if adapters.shared else "one for writing, one for reading"),
        "written per chunk": f"{config.tokens} rows per layer",
        "short-term memory": f"{config.pool:,} rows per layer"
        + ("" if checkpoint.initialized else ", not initialised"),
    }
    if config.kind == "mplus":
        counts = sorted(set(checkpoint.long_term_rows))
        rows = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        facts["long-term memory"] = f"{rows} rows per layer, {config.retrieved:,} retrieved per read"
        facts["retriever"] = f"{config.selector_layers}-layer projectors of width {config.selector_width}"
    if checkpoint.ignored:
        facts["left out"] = f"{len(checkpoint.ignored)} tensors that nothing reads, such as {checkpoint.ignored[0]}"
    return facts


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
