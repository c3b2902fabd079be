"""What is checked before and while a memory is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError, NonFiniteError


def check_whole(ids: Tensor) -> None:
    """Raises InputError unless the dtype is one of whole numbers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"ids must be whole numbers, got dtype {ids.dtype}")


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raises InputError naming the first id outside ``[0, vocab_size)`` and its place."""
    wrong = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        where = f"at position {place[-1]}" + (f" of batch row {place[0]}" if len(place) > 1 else "")
        raise InputError(f"ids must lie in the vocabulary, 0 to {vocab_size - 1}, got {int(ids[tuple(place)])} {where}")


def check_chunk(ids: Any, batch_size: int, min_tokens: int, max_tokens: int) -> None:
    """Raises InputError unless these are ids ``[batch_size, n]`` of a chunk that can be written as it is."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != batch_size:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"a chunk must be a tensor of shape [{batch_size}, n], got {got}")
    check_whole(ids)
    if not min_tokens <= ids.shape[1] <= max_tokens:
        raise InputError(
            f"a chunk must have min_chunk_tokens to chunk_tokens ({min_tokens} to {max_tokens}) tokens, "
            f"got {ids.shape[1]}: use write, which splits and joins"
        )


def check_row(row: Any, batch_size: int) -> None:
    """Raises InputError unless ``row`` is a batch row."""
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < batch_size:
        raise InputError(f"row must be a batch row, 0 to {batch_size - 1}, got {row!r}")


def check_rows(rows: Any, batch_size: int) -> None:
    """Raises InputError unless ``rows`` is a sequence of one batch row or more."""
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise InputError(f"rows must be a list of one batch row or more, got {rows!r}")
    for row in rows:
        check_row(row, batch_size)


def check_dtype(memory: torch.dtype, model: torch.dtype) -> None:
    """Raises MemoryMismatchError unless a memory holds what its decoder computes in."""
    if memory != model:
        raise MemoryMismatchError(
            f"the memory holds {memory} and the model computes in {model}: use memory.to(dtype={model})"
        )


def check_finite(values: Tensor, where: str) -> None:
    """Raises NonFiniteError when there is NaN or Inf in what a decoder computed."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"what the decoder computes must be finite, got NaN or Inf {where}; the chunk was not written: "
            f"check the weights, or use a wider dtype than {values.dtype}"
        )
