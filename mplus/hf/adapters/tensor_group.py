"""Groups of tensors that are watched for changes: cheaply for every prompt, in full when something has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mplus.memory.weights_state import PARTIAL

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtypes of whole numbers, by their bytes."""
SAMPLES = 64
"""Numbers of a sampled tensor that are looked at, evenly spaced."""
PIECE = 2**20
"""Numbers that are summed together."""
CHUNK = 2**14
"""Numbers in a row of the sums of a mark."""
FEW_BYTES = 2**16
"""Most bytes that a mark keeps as they are; of more it keeps a sum."""
ODD = -7046029254386353131
"""An odd 64-bit number whose multiples are far apart."""

Mark = tuple[tuple[tuple[int, int], ...] | int | bytes, ...]
"""Places of tensors, and sums or bytes of their numbers."""


class Moment:
    """A moment of looking: at one and the same moment a tensor is read once, however often it is asked for."""


class TensorGroup:
    """Tensors with their names.

    Args:
        named: the tensors; those that are elsewhere just now (on the meta device, or other shards) cannot be looked at.
        sampled: ``mark`` looks at ``SAMPLES`` numbers of each; else at all.
        facts: further plain text that belongs to them.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], *, sampled: bool, facts: Sequence[str] = ()) -> None:
        every = [(name, tensor.to_local() if hasattr(tensor, "to_local") else tensor) for name, tensor in named]
        self.named = [(name, tensor) for name, tensor in every if tensor.device.type != "meta"]
        self.sampled = sampled
        self.facts = tuple(facts)
        self.empty = not every
        self._partial = len(self.named) < len(every) or any(hasattr(tensor, "to_local") for _, tensor in every)
        self._moment: Moment | None = None
        self._mark: Mark = ()
        self._digest: tuple[Mark | None, str] = None, ""

    @torch.no_grad()
    def mark(self, moment: Moment | None = None) -> Mark:
        """Return a mark that differs once a number looked at has changed, or a tensor was moved or changed in place.

        At the same ``moment`` as before it is not computed again.
        """
        if moment is None or moment is not self._moment:
            tensors = [tensor for _, tensor in self.named]
            numbers = [_bits(one) if one.nbytes <= FEW_BYTES else _sum(one) for one in _alike(tensors, self.sampled)]
            self._mark = (places(tensors), *numbers)
            self._moment = moment
        return self._mark

    def digest(self, moment: Moment | None = None) -> str:
        """Return a digest of all numbers, the same wherever the tensors lie; computed when ``mark`` has changed."""
        mark = self.mark(moment)
        seen, digest = self._digest
        if mark != seen:
            found = hashlib.sha256("".join(self.facts).encode())
            for name, tensor in self.named:
                found.update(f"{name} {list(tensor.shape)} {tensor.dtype} {_sums(tensor)}\n".encode())
            # A bool counts as 0 or 1: the mark in front of a digest of some of the tensors, or nothing.
            digest = PARTIAL * self._partial + found.hexdigest()[:16]
            self._digest = mark, digest
        return digest


def places(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Return place and number of in-place changes of each tensor."""
    # A tensor made in inference mode counts no changes; outside of that mode it allows none either.
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def _alike(tensors: Sequence[Tensor], sampled: bool) -> list[Tensor]:
    """Return the numbers to look at, one tensor for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        count = tensor.numel()
        if count:
            flat = tensor if tensor.is_contiguous() else tensor.contiguous()
            step = max(1, count // SAMPLES) if sampled else 1
            # A strided view: samples of a tensor of gigabytes cost no copy of it.
            view = torch.as_strided(flat, ((count + step - 1) // step,), (step,))
            groups.setdefault((tensor.device, tensor.dtype), []).append(view)
    return [torch.cat(group) for group in groups.values()]


def _bits(numbers: Tensor) -> bytes:
    return bytes(numbers.view(torch.uint8).cpu().numpy())


def _sum(numbers: Tensor) -> int:
    """Return the sum of all bits times odd numbers, which also changes when two numbers are exchanged."""
    rest = -numbers.nbytes % (8 * CHUNK) // numbers.itemsize  # missing to whole rows of 64-bit numbers
    padded = torch.cat([numbers, numbers.new_zeros(rest)]) if rest else numbers
    rows = padded.view(torch.int64).view(-1, CHUNK)
    sums = (rows * _factors(CHUNK, numbers.device)).sum(1)
    return int((sums * _factors(len(sums), numbers.device)).sum())


@lru_cache(maxsize=64)
def _factors(count: int, device: torch.device) -> Tensor:
    return (torch.arange(1, count + 1, device=device) * ODD) | 1


@torch.no_grad()
def _sums(tensor: Tensor) -> tuple[int, ...]:
    """Return sums over the bits of all numbers, read as whole numbers: any one that changes changes the first."""
    first = second = torch.zeros((), dtype=torch.int64, device=tensor.device)
    whole = tensor.detach().contiguous().flatten().view(WHOLE[tensor.dtype.itemsize])
    for number, piece in enumerate(whole.split(PIECE)):
        long = piece.long()
        first = first + long.sum()
        # Another odd factor for each piece, so that it shows where two pieces were exchanged.
        second = second + (long * _factors(PIECE, tensor.device)[: len(long)]).sum() * (2 * number + 1)
    return int(first), int(second)  # overflow is as good as any other number
