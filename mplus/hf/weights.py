"""Which weights a memory was made with, as far as it keeps what they computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor, nn

from mplus.hf.projection import reading_parameters
from mplus.hf.retrofit import Retrofit

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes."""
PIECE = 2**22
"""Numbers of a tensor looked at together."""


@define(frozen=True, eq=False)
class Weights:
    """The weights that projections and retriever keys come from, at one moment.

    Attributes:
        tensors: the weights themselves; those that are elsewhere just now (offloaded) are left out.
        stamp: place and number of in-place changes of each.
        digest: of all their numbers.
    """

    tensors: Sequence[Tensor] = field(repr=False)
    stamp: tuple[tuple[int, int], ...] = field(repr=False)
    digest: str

    @staticmethod
    def of(retrofit: Retrofit, adapter: str | None, retriever: nn.Module | None) -> Weights:
        """The weights as they are now."""
        tensors: list[Tensor] = list(reading_parameters(retrofit, adapter))
        if retriever is not None:
            tensors += retriever.parameters()
        tensors = [tensor for tensor in tensors if tensor.device.type != "meta"]
        digest = " ".join(f"{number:x}" for tensor in tensors for number in _sums(tensor))
        return Weights(tensors, stamp(tensors), digest)

    def current(self) -> bool:
        """Whether no tensor was changed in place or moved since."""
        return self.stamp == stamp(self.tensors)


def stamp(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Place and number of in-place changes of each tensor."""
    # A tensor made in inference mode counts no changes; outside of that mode it allows none either.
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


@torch.no_grad()
def _sums(tensor: Tensor) -> tuple[int, int]:
    """Sums over the bits of all numbers, read as whole numbers: any one that changes changes the first."""
    first = second = torch.zeros((), dtype=torch.int64, device=tensor.device)
    whole = tensor.detach().contiguous().flatten().view(WHOLE[tensor.dtype.itemsize])
    for piece in whole.split(PIECE):
        long = piece.long()
        first = first + long.sum()
        second = second + (long * long).sum()  # overflow is as good as any other number
    return int(first), int(second) % 2**64
