"""Checks of arguments, of what a decoder computed, and of the form of rows."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError, NonFiniteError
from mplus.stores.base import StoreLayout

OPTIONAL = frozenset({"key", "expiry"})
"""Columns that rows of a layout that has them may lack."""


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


def check_chunk(ids: Any, batch_size: int, min_tokens: int, max_tokens: int) -> None:
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


def check_row(row: Any, batch_size: int) -> int:
    """Return ``row`` as an int. Raises InputError unless it is a batch row."""
    whole = row.ndim == 0 and not row.is_floating_point() if isinstance(row, Tensor) else not isinstance(row, bool)
    try:
        number = operator.index(row) if whole and getattr(row, "dtype", None) != torch.bool else -1
    except TypeError:
        number = -1
    if not 0 <= number < batch_size:
        raise InputError(f"row must be a batch row, 0 to {batch_size - 1}, got {row!r}")
    return number


def check_rows(rows: Any, batch_size: int) -> list[int]:
    """Return batch rows as a list of int.

    Args:
        rows: numbers of rows, in a sequence or ``[n]`` tensor or array of whole numbers; or, for each batch row,
            whether it is wanted, in a sequence or ``[batch_size]`` tensor or array of bool.
        batch_size: of the memory.

    Raises:
        InputError: it is something else, names no row, or one that is not there.
    """
    given = rows
    if hasattr(rows, "tolist") and getattr(rows, "ndim", 0) == 1:
        rows = rows.tolist()
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes) or not rows:
        raise InputError(f"rows must be a list of one batch row or more, got {given!r}")
    if all(isinstance(row, bool) for row in rows):
        if len(rows) != batch_size or not any(rows):
            raise InputError(
                f"rows as a mask must have one bool for each of {batch_size} batch rows and choose one or more, "
                f"got {given!r}"
            )
        return [place for place, wanted in enumerate(rows) if wanted]
    return [check_row(row, batch_size) for row in rows]


def check_target(device: Any, dtype: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Read the arguments of ``to`` as torch does: device, dtype, or both; or a tensor that has both.

    Raises:
        InputError: rows cannot be kept in that dtype, or there.
    """
    if isinstance(device, Tensor):
        device, dtype = device.device, device.dtype if dtype is None else dtype
    elif isinstance(device, torch.dtype):
        if dtype is not None:
            raise InputError(f"to takes one dtype, got {device} and {dtype}")
        device, dtype = None, device
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be a floating torch.dtype, got {dtype!r}: the store 'quantized' keeps 8 bits")
    return None if device is None else check_device(device), dtype


def check_device(device: Any) -> torch.device:
    """Return a device that keeps rows. Raises InputError for the meta device, whose tensors have no values."""
    found = torch.device(device)
    if found.type == "meta":
        raise InputError("rows cannot be kept on the meta device, whose tensors have no values: name another device")
    return found


def check_dtype(memory: torch.dtype, model: torch.dtype) -> None:
    """Raise MemoryMismatchError unless a memory holds what its decoder computes in."""
    if memory != model:
        raise MemoryMismatchError(
            f"the memory holds {memory} and the model computes in {model}: use memory.to(dtype={model})"
        )


def check_finite(values: Tensor, where: str) -> None:
    """Raise NonFiniteError when there is NaN or Inf in what a decoder computed."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"what the decoder computes must be finite, got NaN or Inf {where}; the chunk was not written: "
            f"check the weights, or use a wider dtype than {values.dtype}"
        )


def check_columns(columns: Mapping[str, Tensor], layout: StoreLayout, where: str) -> None:
    """Raise MemoryMismatchError unless these are the columns of rows; ``OPTIONAL`` ones may be there or not.

    Args:
        columns: by name.
        layout: of the rows.
        where: they are, in messages.
    """
    described = layout.columns()
    if not described.keys() - OPTIONAL <= columns.keys() <= described.keys():
        raise MemoryMismatchError(f"{where} must have the columns {sorted(described)}, got {sorted(columns)}")
    count = columns["birth"].shape[:1] or (0,)
    for name, column in columns.items():
        shape, dtype = described[name]
        if column.dtype != dtype or column.shape != (*count, *shape):
            raise MemoryMismatchError(
                f"{where}: column {name!r} must be {dtype} {[*count, *shape]}, got {column.dtype} {list(column.shape)}"
            )


def forms(tensors: Mapping[str, Tensor], leave_out: int) -> dict[str, Any]:
    """Return dtype and shape of each tensor, but for its first ``leave_out`` dimensions."""
    return {name: (tensor.dtype, tuple(tensor.shape[leave_out:])) for name, tensor in sorted(tensors.items())}
