"""AutoShare: the share of tokens that is swapped, found from what the first step of a training measures."""

from __future__ import annotations

import math

import torch
from attrs import define, field

from mplus.training.activations.planning import LayerBytes, swapped_share

PROBE = 64 << 20
"""Bytes of the copy that measures how fast a GPU's memory goes to the host."""


@define(eq=False)
class AutoShare:
    """Measures one step, in which no share is swapped, and goes by what it found from then on.

    On a GPU as much is swapped as can be copied while as many layers compute; on a CPU, where a copy takes the time of
    the computation and none is hidden behind it, as much as the host may take.

    Attributes:
        host_bytes: that the host may take; None: no limit.
        share: of the present step.
    """

    host_bytes: int | None
    share: float = 0.0
    _seen: list[LayerBytes] = field(factory=list)
    _times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(factory=list)
    _measured: bool = False

    def note(self, sizes: LayerBytes) -> None:
        """Take the bytes of one layer of the step."""
        self._seen.append(sizes)

    def time(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Take the events around one layer's forward."""
        if not self._measured:
            self._times.append((begin, end))

    @property
    def is_measuring(self) -> bool:
        """Return whether the times of layers are wanted."""
        return not self._measured

    def begin_step(self, device: torch.device) -> None:
        """Decide on the share of a step, from the bytes of the one before."""
        if not self._seen:
            return
        seen, self._seen = self._seen, []
        total = LayerBytes(*(sum(getattr(one, name) for one in seen) for name in ("input", "attention", "others")))
        host = math.inf if self.host_bytes is None else self.host_bytes
        if not self._measured:
            self._rate = _bytes_per_second(device) * self._seconds() / total.total if self._times else math.inf
            self._measured, self._times = True, []
        # Steps differ in length: what is measured is the part of a layer's bytes that a copy gets done meanwhile.
        found = swapped_share(total, transferable=self._rate * total.total, host=host)
        self.share = found or 0.0

    _rate: float = math.inf

    def _seconds(self) -> float:
        # The last event alone: those before it, of the same stream, are over by then.
        self._times[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._times)) / 1000


def _bytes_per_second(device: torch.device) -> float:
    """Measure how fast a GPU's memory is copied to pinned memory."""
    original = torch.zeros(PROBE, dtype=torch.uint8, device=device)
    copy = torch.empty(PROBE, dtype=torch.uint8, pin_memory=True)
    copy.copy_(original)  # the first copy pays for what is set up once
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    copy.copy_(original, non_blocking=True)
    end.record()
    end.synchronize()
    return float(PROBE / begin.elapsed_time(end) * 1000)
