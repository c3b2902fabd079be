"""Cut texts or ids into chunks, and check that they can be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from attrs import define
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.writing.messages import Message, is_conversation, turns
from mplus.tokenizer import Tokenizer

Ids: TypeAlias = Tensor | Sequence[int]
"""Token ids ``[n]``."""
Writable: TypeAlias = str | Ids | Sequence[Message] | Mapping[str, Any]
"""A text, its ids, a list of chat messages, or what ``apply_chat_template`` returns."""
WriteData: TypeAlias = Writable | Sequence[Writable | None]
"""What ``Memory.write`` takes: one of these, ids of a batch ``[B, n]``, or a list with one of these or None per row."""
SourceNames: TypeAlias = str | Sequence[str | None] | None
"""The name of a source, or one per batch row."""
NOTHING = "there is nothing to write: the text, ids or messages are empty"


@define(frozen=True)
class Turns:
    """The texts of the turns of one conversation."""

    texts: Sequence[str]


Item: TypeAlias = str | Ids | Turns | None
"""What is to be written to one batch row."""


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
    # As few chunks at the end as can share their tokens so that each has its least.
    while sum(map(len, chunks[-shared:])) < shared * min_chunk_tokens:
        shared += 1
        if shared > len(chunks):
            raise InputError(
                f"{n} tokens cannot be cut into chunks of min_chunk_tokens to chunk_tokens ({min_chunk_tokens} to "
                f"{chunk_tokens}) tokens: lower min_chunk_tokens to at most half of chunk_tokens"
            )
    chunks[-shared:] = torch.cat(chunks[-shared:]).tensor_split(shared)
    return chunks


def cut_up(ids: Tensor, chunk_tokens: int, min_chunk_tokens: int) -> tuple[list[Tensor], Tensor]:
    """Return the chunks that ``split`` cuts; where it cannot, all full chunks; and the ids that are left over."""
    n = ids.shape[0]
    # Enough tokens for the least length of each of as many chunks as there have to be.
    if n and -(-n // chunk_tokens) * min_chunk_tokens <= n:
        return split(ids, chunk_tokens, min_chunk_tokens), ids[:0]
    end = n - n % chunk_tokens
    return list(ids[:end].split(chunk_tokens)) if end else [], ids[end:]


def cut_with_tail(
    waiting: Tensor, texts: Sequence[Tensor], *, chunk_tokens: int, min_chunk_tokens: int, shortest_text: int
) -> tuple[list[Tensor], Tensor]:
    """Cut texts of one source into chunks, and return what has to wait for more: less than a chunk.

    A text shorter than ``shortest_text`` waits. With what waits a chunk is filled up, by short texts as they come or by
    the beginning of a long one. What waits and is long enough makes a chunk of its own before a long text, or before a
    short one that would not fit in: so a chunk spans no texts but short ones, as far as that can be.

    Args:
        waiting: ids ``[n]`` that wait already.
        texts: ids ``[n_i]``.
        chunk_tokens, min_chunk_tokens: as for ``split``.
        shortest_text: tokens of a text that does not wait.

    Returns:
        The chunks, which begin with what waited, and the ids ``[m]`` that wait then.
    """
    chunks, held = list[Tensor](), waiting
    for text in texts:
        long = len(text) >= shortest_text
        if len(held) >= shortest_text and (long or len(held) + len(text) > chunk_tokens):
            chunks.append(held)
            held = text[:0]
        held = torch.cat([held, text])
        if long or len(held) >= chunk_tokens:
            full, held = cut_up(held, chunk_tokens, min_chunk_tokens)
            chunks += full
    return chunks, held


def to_rows(data: WriteData, batch_size: int, tokenizer: Tokenizer | None) -> list[list[Tensor]]:
    """Return the texts of each batch row as ``[n]`` int64: one, one for each turn of a conversation, or none.

    Args:
        data: as for ``Memory.write``.
        batch_size: B of the memory.
        tokenizer: needed for text; called with ``add_special_tokens=False``.

    Raises:
        InputError: wrong batch size, wrong type, nothing to write at all, or text without a tokenizer.
    """
    rows = [_to_ids(item, tokenizer) for item in to_items(data, batch_size)]
    if not any(rows):
        raise InputError(NOTHING)
    return rows


def to_items(data: WriteData, batch_size: int) -> list[Item]:
    """Return what ``data`` has for each batch row; a conversation as the texts of its turns.

    Raises InputError as ``to_rows``.
    """
    if is_conversation(data):
        items: list[Item] = [Turns(turns(data))]
    elif isinstance(data, Mapping):
        items = _without_padding(data)
    elif isinstance(data, str):
        items = [data]
    else:
        items = [_item(item, row) for row, item in enumerate(_rows_of(data))]
    if items and len(items) != batch_size:
        raise InputError(f"write needs one text per batch row ({batch_size}), got {len(items)}")
    return items


def _rows_of(data: Any) -> list[Any]:
    """Return the rows of ids ``[n]`` or ``[B, n]``, a tensor, an array or a list; or the items of another list."""
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        ids = torch.as_tensor(data)
        if ids.dim() not in (1, 2):
            raise InputError(f"ids must have shape [n] or [batch, n], got {list(ids.shape)}")
        return [ids] if ids.dim() == 1 else list(ids)
    if not isinstance(data, Sequence) or isinstance(data, bytes | bytearray):
        raise InputError(f"write takes text, ids, chat messages or a list of them, got {type(data).__name__}")
    return [data] if data and all(isinstance(item, int) for item in data) else list(data)


def _item(item: Any, row: int) -> Item:
    """Return what one batch row of a list is given. Raises InputError as ``to_rows``."""
    if is_conversation(item):
        return Turns(turns(item, f"messages[{row}]"))
    if isinstance(item, Mapping):
        (item,) = to_items(item, 1)
    return cast("Item", item)


def _without_padding(encoded: Mapping[str, Any]) -> list[Item]:
    """Return the ids ``[n]`` of each row of what a tokenizer returned. Raises InputError: it is no such thing."""
    if "input_ids" not in encoded:
        raise InputError(
            "a mapping to write must have 'input_ids', as apply_chat_template returns it, got the keys "
            f"{sorted(map(str, encoded))}: put chat messages into a list"
        )
    rows, mask = _rows_of(encoded["input_ids"]), encoded.get("attention_mask")
    if mask is None:
        return [checked_ids(ids) for ids in rows]
    marks = _rows_of(mask)
    if [len(ids) for ids in rows] != [len(real) for real in marks]:
        raise InputError(
            f"attention_mask must have as many numbers as input_ids in each row, {[len(ids) for ids in rows]}, got "
            f"{[len(real) for real in marks]}"
        )
    found = ((checked_ids(ids), torch.as_tensor(real).bool()) for ids, real in zip(rows, marks, strict=True))
    return [None if ids is None else ids[real] for ids, real in found]


def _to_ids(item: Item, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Return the ids of every text of one batch row that has any."""
    if not isinstance(item, str | Turns):
        found = [] if item is None else [checked_ids(item)]
    elif texts := [text for text in ([item] if isinstance(item, str) else item.texts) if text]:
        if tokenizer is None:
            raise InputError("writing text needs a tokenizer: pass tokenizer= to new_memory or load, or write ids")
        # Not verbose: a text is longer than a prompt, on purpose.
        encoded = (tokenizer(text, add_special_tokens=False, verbose=False) for text in texts)
        found = [checked_ids(one["input_ids"]) for one in encoded]
    else:
        found = []
    return [ids for ids in found if ids is not None]


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
