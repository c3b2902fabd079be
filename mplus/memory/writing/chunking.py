"""Cut texts or ids into chunks, and check that they can be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from mplus.errors import InputError

Ids: TypeAlias = Tensor | Sequence[int]
"""Token ids ``[n]``."""
WriteData: TypeAlias = str | Ids | Sequence[str | Ids | None]
"""What ``Memory.write`` takes: a text, ids ``[n]`` or ``[B, n]``, or a list with a text, ids or None per batch row."""
SourceNames: TypeAlias = str | Sequence[str | None] | None
"""The name of a source, or one per batch row."""


class Tokenizer(Protocol):
    """Turns text into ids and back, as the tokenizers of transformers do."""

    def __call__(self, text: str | list[str], /, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Return the ids of a text, or of each of several, as ``input_ids``."""

    def decode(self, token_ids: Tensor, /, *, skip_special_tokens: bool) -> str | list[str]:
        """Return the text of ids ``[n]``."""


def split(ids: Tensor, chunk_tokens: int, min_chunk_tokens: int) -> list[Tensor]:
    """Cut ``[n]`` ids into chunks of ``chunk_tokens``; a last piece that is too short shares evenly with its neighbour.

    It shares with more of them where ``min_chunk_tokens`` is more than half of ``chunk_tokens``.

    Raises:
        InputError: there are too few ids for one chunk, or no way to cut them.
    """
    n = ids.shape[0]
    if n < min_chunk_tokens:
        raise InputError(
            f"a text to write must have at least min_chunk_tokens ({min_chunk_tokens}) tokens, got {n}: "
            "join it with its neighbours, or lower min_chunk_tokens in the config"
        )
    chunks, shared = list(ids.split(chunk_tokens)), 1
    while sum(map(len, chunks[-shared:])) < shared * min_chunk_tokens:
        shared += 1
        if shared > len(chunks):
            raise InputError(
                f"{n} tokens cannot be cut into chunks of min_chunk_tokens to chunk_tokens ({min_chunk_tokens} to "
                f"{chunk_tokens}) tokens: lower min_chunk_tokens to at most half of chunk_tokens"
            )
    chunks[-shared:] = torch.cat(chunks[-shared:]).tensor_split(shared)
    return chunks


def to_rows(data: WriteData, batch_size: int, tokenizer: Tokenizer | None) -> list[Tensor | None]:
    """Return one ``[n]`` int64 tensor per batch row; None for a row with nothing to write.

    Args:
        data: a text, ids ``[n]`` or ``[B, n]`` (tensor or nested list), or a list with a text, ids or None per row.
        batch_size: B of the memory.
        tokenizer: needed for text; called with ``add_special_tokens=False``.

    Raises:
        InputError: wrong batch size, wrong type, nothing to write at all, or text without a tokenizer.
    """
    rows = [_to_ids(item, tokenizer) for item in to_items(data, batch_size)]
    if all(row is None for row in rows):
        raise InputError("there is nothing to write: the text or ids are empty")
    return rows


def to_items(data: WriteData, batch_size: int) -> list[str | Ids | None]:
    """Return what ``data`` has for each batch row: a text, ids or None. Raises InputError as ``to_rows``."""
    items: list[str | Ids | None]
    if isinstance(data, Tensor):
        if data.dim() not in (1, 2):
            raise InputError(f"ids must have shape [n] or [batch, n], got {list(data.shape)}")
        items = [data] if data.dim() == 1 else list(data)
    elif isinstance(data, str):
        items = [data]
    elif isinstance(data, Sequence) and not isinstance(data, bytes | bytearray):
        numbers = bool(data) and all(isinstance(item, int) for item in data)
        items = cast("list[str | Ids | None]", [data] if numbers else list(data))
    else:
        raise InputError(f"write takes text, ids or a list of them, got {type(data).__name__}")
    if items and len(items) != batch_size:
        raise InputError(f"write needs one text per batch row ({batch_size}), got {len(items)}")
    return items


def _to_ids(item: str | Ids | None, tokenizer: Tokenizer | None) -> Tensor | None:
    if item is None:
        return None
    if isinstance(item, str):
        if not item:
            return None
        if tokenizer is None:
            raise InputError("writing text needs a tokenizer: pass tokenizer= to new_memory or load, or write ids")
        text = tokenizer(item, add_special_tokens=False, verbose=False)  # longer than a prompt, on purpose
        return checked_ids(text["input_ids"])
    return checked_ids(item)


def checked_ids(item: Ids) -> Tensor | None:
    """Return the ids of one batch row as ``[n]`` int64; None: there are none. Raises InputError: they are no ids."""
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"the ids of one batch row must be a list of whole numbers, got {item!r:.80}") from error
    if ids.dim() != 1:
        raise InputError(f"the ids of one batch row must have shape [n], got {list(ids.shape)}")
    if ids.numel() == 0:
        return None
    check_whole(ids)
    return ids.to(torch.int64)


def to_names(source: SourceNames, batch_size: int) -> list[str | None]:
    """Return the name of the source for each batch row. Raises InputError unless it is one name, or one per row."""
    if source is None or isinstance(source, str | bytes) or not isinstance(source, Sequence):
        names: list[str | None] = [source] * batch_size
    else:
        names = list(source)
    if len(names) != batch_size:
        raise InputError(f"source must be one name or one per batch row ({batch_size}), got {len(names)} names")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise InputError(f"source must be a text or None, got {name!r} ({type(name).__name__})")
    return names


# ---------------------------------------------------------------------- checks


def check_whole(ids: Tensor) -> None:
    """Raise InputError unless the dtype is one of whole numbers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"ids must be whole numbers, got dtype {ids.dtype}")


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raise InputError naming the first id outside ``[0, vocab_size)`` and its place."""
    wrong = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        where = f"at position {place[-1]}" + (f" of batch row {place[0]}" if len(place) > 1 else "")
        raise InputError(f"ids must lie in the vocabulary, 0 to {vocab_size - 1}, got {int(ids[tuple(place)])} {where}")


def check_chunk(ids: Tensor, batch_size: int, min_tokens: int, max_tokens: int) -> None:
    """Raise InputError unless these are ids ``[batch_size, n]`` of a chunk that can be written as it is."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != batch_size:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"a chunk must be a tensor of shape [{batch_size}, n], got {got}")
    check_whole(ids)
    if not min_tokens <= ids.shape[1] <= max_tokens:
        raise InputError(
            f"a chunk must have min_chunk_tokens to chunk_tokens ({min_tokens} to {max_tokens}) tokens, "
            f"got {ids.shape[1]}: use write, which splits and joins"
        )
