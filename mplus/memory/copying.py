"""Copies of a memory: some or all of its streams, here or elsewhere; and the rows and devices that callers ask for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mplus.errors import InputError, MemoryPickleError
from mplus.memory.budget import Budget
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams
from mplus.stores.base import MemoryStore
from mplus.stores.sharing import each


def copied(
    streams: Streams,
    rows: Sequence[int],
    copy: Callable[[MemoryStore], MemoryStore] = lambda store: store.fork(),
    change: Callable[[StreamState], StreamState] = lambda state: state,
) -> Streams:
    """Return some of the streams as those of another memory, kept in memory only, which goes on independently.

    Args:
        streams: where they are.
        rows: their batch rows; a row may come several times.
        copy: makes the store of the copy.
        change: makes the state of the copy.
    """
    with streams.state_lock:
        streams.resolve_aborted()
        states = each([streams.states[row] for row in rows], change)
        stores = each([streams.stores[row] for row in rows], copy)
        generators = [torch.Generator().set_state(streams.generators[row].get_state()) for row in rows]
        access_logs = [notes.fork() for notes in map(streams.access_logs.__getitem__, rows) if notes is not None]
    engine, budget = streams.engine, streams.budget
    if budget.bytes is not None and stores[0].layout != streams.stores[0].layout:  # rows take another room there
        budget = Budget.of(budget.bytes, engine.config, engine.mechanism, stores[0], len(streams))
    return Streams(engine, states, stores, generators, streams.eviction, budget, access_logs, clock=streams.clock)


def moved(streams: Streams, device: torch.device | None, dtype: torch.dtype | None) -> Streams:
    """Return a copy of all streams on another device or in another dtype; see ``Memory.to``."""
    where = streams.device if device is None else device
    rows = range(len(streams))
    if streams.engine.writes_text:  # text is on no device, and has no dtype
        return copied(streams, rows)
    return copied(streams, rows, lambda store: store.to(device, dtype), lambda state: state.to(where, dtype))


def pickle_error() -> MemoryPickleError:
    """Return the error that says what to do instead of pickling a memory."""
    return MemoryPickleError(
        "a memory cannot be pickled (by pickle, torch.save, or to reach another process), since it belongs to one "
        "decoder: use memory.save(path) and mplus.Memory.load(path, model) there, or keep it in a directory and "
        "use mplus.Memory.open(path, model, read_only=True) there"
    )


# ---------------------------------------------------------------------- arguments


def check_row(row: int | Tensor, batch_size: int) -> int:
    """Return ``row`` as an int. Raises InputError unless it is a batch row."""
    whole = row.ndim == 0 and not row.is_floating_point() if isinstance(row, Tensor) else not isinstance(row, bool)
    try:
        number = operator.index(row) if whole and getattr(row, "dtype", None) != torch.bool else -1
    except TypeError:
        number = -1
    if not 0 <= number < batch_size:
        raise InputError(f"row must be a batch row, 0 to {batch_size - 1}, got {row!r}")
    return number


def check_rows(rows: Sequence[int] | Sequence[bool] | Tensor, batch_size: int) -> list[int]:
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


def check_target(
    device: torch.device | str | int | torch.dtype | Tensor | None, dtype: torch.dtype | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """Read the arguments of ``to`` as torch does: device, dtype, or both; or a tensor that has both.

    Raises:
        InputError: rows cannot be kept in that dtype, or there.
    """
    if isinstance(device, Tensor):
        dtype = device.dtype if dtype is None else dtype
        device = device.device
    elif isinstance(device, torch.dtype):
        if dtype is not None:
            raise InputError(f"to takes one dtype, got {device} and {dtype}")
        device, dtype = None, device
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be a floating torch.dtype, got {dtype!r}: the store 'quantized' keeps 8 bits")
    return None if device is None else check_device(device), dtype


def check_device(device: torch.device | str | int) -> torch.device:
    """Return a device that keeps rows. Raises InputError for the meta device, whose tensors have no values."""
    found = torch.device(device)
    if found.type == "meta":
        raise InputError("rows cannot be kept on the meta device, whose tensors have no values: name another device")
    return found
