"""How rows get from the host to the device: beside what the device computes, where it is a GPU.

What is done for a CUDA device here was **not run on a GPU**; on a CPU every function of this module does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.stores.base import Chunk, Location


class Transfer:
    """Copies to one device.

    On CUDA they run in a stream of their own, from page-locked memory: the device goes on with what it was given, and
    whoever needs the rows lets its stream wait for them (``CopyEvent``).

    Attributes:
        device: where rows are wanted.
        pinned: whether memory on the host is page-locked.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run what is given to the device inside beside the present stream, which has made none of it."""
        if not self.pinned:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            yield

    def to_device(self, column: Tensor) -> Tensor:
        """Return a column on the device; does not wait for it."""
        if not self.pinned or column.device == self.device:
            return column
        return (column if column.is_pinned() else column.pin_memory()).to(self.device, non_blocking=True)

    def event(self) -> CopyEvent:
        """Return the event of everything that was sent so far."""
        return CopyEvent(self._stream.record_event() if self.pinned and self._stream is not None else None)


@define(frozen=True, eq=False)
class CopyEvent:
    """When rows that were sent can be used; ``event``: of the stream they are copied in, None: now."""

    event: torch.cuda.Event | None = None

    def wait(self, columns: Collection[Tensor]) -> None:
        """Let the present stream wait for ``columns``; the calling thread does not."""
        if self.event is None:
            return
        for column in columns:
            stream = torch.cuda.current_stream(column.device)
            stream.wait_event(self.event)
            column.record_stream(stream)


@define(frozen=True, eq=False)
class PendingLocation(Location):
    """Content that may be on its way yet; ``event`` is awaited when it is looked at."""

    event: CopyEvent = field(factory=CopyEvent)

    def contiguous(self) -> tuple[Tensor, Tensor]:
        self.event.wait([column for column, _ in self.parts])
        return Location.contiguous(self)


@define(frozen=True, eq=False)
class _MovedColumns(Mapping[str, Tensor]):
    """Columns that are moved to a device when they are looked at, and not kept."""

    columns: Mapping[str, Tensor]
    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name].to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def on_device(chunk: Chunk, device: torch.device) -> Chunk:
    """Return a chunk as readers on ``device`` see it."""
    if chunk.ids.device == device:
        return chunk
    live = None if chunk.live is None else chunk.live.to(device)
    return evolve(chunk, ids=chunk.ids.to(device), live=live, columns=_MovedColumns(chunk.columns, device))
