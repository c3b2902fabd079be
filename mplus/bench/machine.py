"""What the machine can do at best, measured: bytes copied and floating-point operations per second."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define

from mplus.timing import median, timed


@define(frozen=True)
class Machine:
    """Measured rates of a device, with the present number of threads.

    Attributes:
        bytes_per_second: read and written by a copy between tensors larger than caches.
        fresh_bytes_per_second: written into memory that was just allocated, as results of operations are.
        flops_per_second: of a product of square matrices.
        dtype: of these matrices.
    """

    bytes_per_second: float
    fresh_bytes_per_second: float
    flops_per_second: float
    dtype: str

    def floor_seconds(self, flops: float, nbytes: float) -> float:
        """The time that the slower of the two needs: the roofline."""
        return max(flops / self.flops_per_second, nbytes / self.bytes_per_second)

    def share(self, flops: float, nbytes: float, seconds: float) -> float:
        """Share of the roofline that was reached."""
        return round(self.floor_seconds(flops, nbytes) / seconds, 4)

    def plain(self) -> dict[str, Any]:
        """For a record."""
        return {
            "copy_gb_per_s": round(self.bytes_per_second / 1e9, 2),
            "fresh_gb_per_s": round(self.fresh_bytes_per_second / 1e9, 2),
            "matmul_gflop_per_s": round(self.flops_per_second / 1e9, 2),
            "matmul_dtype": self.dtype,
        }


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Machine:
    """Measure all of it; ``quick`` with small tensors, for tests."""
    large = device.type == "cuda"
    size = 2**16 if quick else (2**31 if large else 2**27)
    side = 64 if quick else (8192 if large else 1024)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    copies, written, products = [], [], []
    for turn in range(8):
        copied = timed(lambda: target.copy_(source), device)
        filled = timed(lambda: torch.ones_like(source), device)
        multiplied = timed(lambda: torch.mm(left, right, out=product), device)
        if turn:
            copies.append(copied)
            written.append(filled)
            products.append(multiplied)
    return Machine(
        bytes_per_second=2 * source.nbytes / median(copies),
        fresh_bytes_per_second=source.nbytes / median(written),
        flops_per_second=2 * side**3 / median(products),
        dtype=str(dtype).removeprefix("torch."),
    )
