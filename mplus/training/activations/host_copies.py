"""HostCopies: copies of activations in host memory, made and brought back beside the computation where there is a GPU.

On a GPU the copies run on two streams of their own, from and to pinned memory. What is known to go wrong in such code
(torchtune issue 1867, trl pull request 7195) cannot happen here:

- An original is freed for other use only after its copy: ``record_stream`` says so to the allocator, and the original
  is held until the event behind the copy has come to pass.
- A copy begins after what computes the original: its stream waits for the stream that computes at that moment.
- What comes back is made on the stream that copies and read on the one that computes, which waits for the event behind
  the copy before any view of it is made, and is recorded as its user.

None of this has run on a GPU yet.
"""

from __future__ import annotations

from collections import deque

import torch
from attrs import define, field
from torch import Tensor

MOST_PENDING = 2
"""Layers whose originals may wait for their copies (MEMO's two rounding buffers)."""


@define(eq=False)
class HostCopy:
    """One tensor in host memory.

    Attributes:
        numbers: the tensor there.
        device: where it came from.
        made: event behind the copy to the host; None on a CPU.
        brought: the tensor on its way back, with the event behind that copy; None: it was not asked for.
    """

    numbers: Tensor
    device: torch.device
    made: torch.cuda.Event | None = None
    brought: tuple[Tensor, torch.cuda.Event] | None = None


@define(eq=False)
class HostCopies:
    """Makes copies in host memory of tensors of one device, and brings them back.

    Attributes:
        device: of the originals.
    """

    device: torch.device
    _out: torch.cuda.Stream | None = None
    _back: torch.cuda.Stream | None = None
    _pending: deque[tuple[torch.cuda.Event, list[Tensor]]] = field(factory=deque)
    _originals: list[Tensor] = field(factory=list)

    @staticmethod
    def of(device: torch.device) -> HostCopies:
        """Return copies of tensors on ``device``, with streams of their own where it is a GPU."""
        if device.type != "cuda":
            return HostCopies(device)
        return HostCopies(device, torch.cuda.Stream(device), torch.cuda.Stream(device))

    def copy(self, tensor: Tensor) -> HostCopy:
        """Begin a copy of ``tensor``, in the order of its dimensions."""
        if self._out is None:
            return HostCopy(tensor.detach().clone(memory_format=torch.contiguous_format), self.device)
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            numbers = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            numbers.copy_(tensor.detach(), non_blocking=True)
            made = self._out.record_event()
        tensor.record_stream(self._out)
        self._originals.append(tensor)
        return HostCopy(numbers, self.device, made)

    def layer_done(self) -> None:
        """Let go of the originals of a layer once their copies are made; wait where too many layers' are not."""
        if self._out is None or not self._originals:
            return
        self._pending.append((self._out.record_event(), self._originals))
        self._originals = []
        while self._pending and (self._pending[0][0].query() or len(self._pending) > MOST_PENDING):
            event, _ = self._pending[0]
            event.synchronize()
            self._pending.popleft()

    def prefetch(self, copy: HostCopy) -> None:
        """Begin to bring a copy back, where that can happen beside the computation."""
        if self._back is None or copy.made is None or copy.brought is not None:
            return
        self._back.wait_event(copy.made)
        with torch.cuda.stream(self._back):
            tensor = torch.empty(copy.numbers.shape, dtype=copy.numbers.dtype, device=self.device)
            tensor.copy_(copy.numbers, non_blocking=True)
            copy.brought = tensor, self._back.record_event()

    def fetch(self, copy: HostCopy) -> Tensor:
        """Return the tensor on its device, for the stream that computes now."""
        self.prefetch(copy)
        if copy.brought is None:
            return copy.numbers
        (tensor, event), copy.brought = copy.brought, None
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(event)
        tensor.record_stream(compute)
        return tensor
