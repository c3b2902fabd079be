"""Loading a saved decoder together with its tokenizer, as commands do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mplus.errors import CheckpointError
from mplus.hf.pretrained.auto import read_config
from mplus.hf.pretrained.hub import find_folder
from mplus.hf.pretrained.peft_folders import memory_folder
from mplus.hf.pretrained.save import BASE, from_pretrained
from mplus.hf.pretrained.shipped import without_bars


def load_with_tokenizer(
    path: str | Path, *, tokenizer: str | Path | None = None, device: str | None = None, dtype: str = "auto"
) -> tuple[Any, Any]:
    """A wrapped decoder in eval mode, and its tokenizer.

    Args:
        path: folder written by ``save_pretrained``, or a repository on the Hub.
        tokenizer: where to take it from; None: from ``path``, else from the decoder saved along, else from where the
            decoder came from.
        device: where to put the decoder; None: as loaded.
        dtype: as in transformers: "auto", "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: no mplus model there, or no tokenizer was found.
    """
    with without_bars():
        number = dtype if dtype == "auto" else getattr(torch, dtype)
        model = from_pretrained(path, dtype=number).eval()
        if device is not None:
            model = model.to(device)
        return model, _tokenizer(path, tokenizer)


def _tokenizer(path: str | Path, named: str | Path | None) -> Any:
    if named is not None:
        places: list[Any] = [named]
    else:
        folder = find_folder(path, {})
        inner = memory_folder(folder)
        places = [folder, inner / BASE, read_config(inner).base_model]
    tried = []
    for place in places:
        if place is None or (isinstance(place, Path) and not place.is_dir()):
            continue
        try:
            # Of an mplus model: its config names no tokenizer class, so the files must.
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            tried.append(f"{place} ({str(error).splitlines()[0]})")
    raise CheckpointError(
        f"{path} must have a tokenizer with it, or be told where one is (tokenizer=), tried {'; '.join(tried)}"
    )
