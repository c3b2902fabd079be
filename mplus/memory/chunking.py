"""From text or ids to chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.errors import InputError


def split(ids: Tensor, chunk_tokens: int, min_chunk_tokens: int) -> list[Tensor]:
    """Cut ``[n]`` ids into chunks of ``chunk_tokens``; a last piece that is too short shares evenly with its neighbour.

    Raises:
        InputError: all of ``ids`` together are shorter than ``min_chunk_tokens``.
    """
    n = ids.shape[0]
    if n < min_chunk_tokens:
        raise InputError(
            f"a text to write must have at least min_chunk_tokens ({min_chunk_tokens}) tokens, got {n}: "
            "join it with its neighbours, or lower min_chunk_tokens in the config"
        )
    chunks = list(ids.split(chunk_tokens))
    if len(chunks) > 1 and chunks[-1].shape[0] < min_chunk_tokens:
        tail = torch.cat(chunks[-2:])
        half = (tail.shape[0] + 1) // 2
        # The neighbour may itself be shorter than twice the minimum; then both pieces become one.
        chunks[-2:] = [tail] if half < min_chunk_tokens and tail.shape[0] <= chunk_tokens else [tail[:half], tail[half:]]
        if chunks[-1].shape[0] < min_chunk_tokens:
            raise InputError(
                f"{n} tokens cannot be cut into chunks of {min_chunk_tokens} to {chunk_tokens} tokens: "
                "lower min_chunk_tokens to at most half of chunk_tokens"
            )
    return chunks


def to_rows(data: Any, batch_size: int, tokenizer: Any) -> list[Tensor | None]:
    """One ``[n]`` int64 tensor per batch row; None for a row with nothing to write.

    Args:
        data: a text, ids ``[n]`` or ``[B, n]`` (tensor or nested list), or a list with a text, ids or None per row.
        batch_size: B of the memory.
        tokenizer: needed for text; called with ``add_special_tokens=False``.

    Raises:
        InputError: wrong batch size, wrong type, nothing to write at all, or text without a tokenizer.
    """
    if isinstance(data, Tensor):
        if data.dim() not in (1, 2):
            raise InputError(f"ids must have shape [n] or [batch, n], got {list(data.shape)}")
        items: list[Any] = [data] if data.dim() == 1 else list(data)
    elif isinstance(data, str) or (isinstance(data, Sequence) and data and all(isinstance(item, int) for item in data)):
        items = [data]
    elif isinstance(data, Sequence):
        items = list(data)
    else:
        raise InputError(f"write takes text, ids or a list of them, got {type(data).__name__}")
    if items and len(items) != batch_size:
        raise InputError(f"write needs one text per batch row ({batch_size}), got {len(items)}")
    rows = [_to_ids(item, tokenizer) for item in items]
    if all(row is None for row in rows):
        raise InputError("there is nothing to write: the text or ids are empty")
    return rows


def _to_ids(item: Any, tokenizer: Any) -> Tensor | None:
    if item is None:
        return None
    if isinstance(item, str):
        if not item:
            return None
        if tokenizer is None:
            raise InputError("writing text needs a tokenizer: pass tokenizer= to new_memory or load, or write ids")
        item = tokenizer(item, add_special_tokens=False)["input_ids"]
    ids = torch.as_tensor(item)
    if ids.dim() != 1:
        raise InputError(f"the ids of one batch row must have shape [n], got {list(ids.shape)}")
    if ids.numel() == 0:
        return None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"ids must be whole numbers, got dtype {ids.dtype}")
    return ids.to(torch.int64)


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raises InputError naming the first id outside ``[0, vocab_size)`` and its place."""
    wrong = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if wrong.numel():
        place = int(wrong[0, -1])
        raise InputError(
            f"ids must lie in the vocabulary, 0 to {vocab_size - 1}, got {int(ids[..., place].flatten()[0])} at position {place}"
        )
