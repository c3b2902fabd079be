"""ActivationCounter: bytes of activations that are alive for backward, on the device and on the host."""

from __future__ import annotations

from typing import Literal

from attrs import define

Place = Literal["device", "host"]


@define(eq=False)
class ActivationCounter:
    """Bytes of activations that are held for backward, and tokens that were recomputed.

    Tensors that share a storage count once; parameters, rotary tables and masks, which outlive a layer, do not count.

    Attributes:
        device: bytes held now where the layers compute.
        host: bytes held now in host memory.
        peak_device, peak_host: the most since ``restart``.
        recomputed_tokens: tokens that backward put through a layer again since ``restart``, summed over layers.
    """

    device: int = 0
    host: int = 0
    peak_device: int = 0
    peak_host: int = 0
    recomputed_tokens: int = 0

    def add(self, place: Place, size: int) -> None:
        """Count ``size`` bytes more; a negative number: fewer."""
        if place == "device":
            self.device += size
            self.peak_device = max(self.peak_device, self.device)
        else:
            self.host += size
            self.peak_host = max(self.peak_host, self.host)

    def restart(self) -> None:
        """Begin to look for peaks, and to count tokens, anew."""
        self.peak_device, self.peak_host, self.recomputed_tokens = self.device, self.host, 0

    def metrics(self) -> dict[str, float]:
        """Return bytes and tokens counted since ``restart``, as metrics of a training step."""
        return {
            "saved_device_bytes": float(self.peak_device),
            "saved_host_bytes": float(self.peak_host),
            "recomputed_tokens": float(self.recomputed_tokens),
        }


class CountedBytes:
    """Bytes that count as held for as long as this object lives."""

    def __init__(self, counter: ActivationCounter, place: Place, size: int) -> None:
        self._counter, self._place, self._size = counter, place, size
        counter.add(place, size)

    def __del__(self) -> None:
        self._counter.add(self._place, -self._size)
