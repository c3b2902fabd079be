"""SavedLayout: how a saved tensor lies in memory, and where in it the tokens are."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from attrs import define
from torch import Size, Tensor

StorageKey: TypeAlias = tuple[int, int, int, int | tuple[int, ...]]
"""What is equal for views of the same numbers: storage, offset, count, and the blocks or sizes they are cut into."""


@define(frozen=True)
class SavedLayout:
    """Places of a tensor's numbers in memory, and its tokens.

    Attributes:
        shape, strides: of the tensor.
        order: dimensions from the largest stride to the smallest.
        sizes: of the dimensions in this order; 1 where all places of a dimension are one in memory.
        gaps: whether its numbers do not lie side by side.
        blocks: numbers of a text that lie in front of its tokens, such as the heads of keys; None: the tensor has no
            dimension of tokens that could be told from others.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    gaps: bool
    blocks: int | None

    @staticmethod
    def of(tensor: Tensor, batch: int, tokens: int) -> SavedLayout:
        """Look at a tensor that a layer saved of ``batch`` texts of ``tokens`` tokens."""
        once = _once(tensor)
        # The stride of a dimension of size 1 says nothing, so that such a dimension stays where it is.
        places, strides = range(once.dim()), once.stride()
        sized = iter(sorted((place for place in places if once.shape[place] > 1), key=lambda place: -strides[place]))
        order = tuple(place if once.shape[place] == 1 else next(sized) for place in places)
        sizes = tuple(once.shape[place] for place in order)
        gaps = not once.permute(order).is_contiguous()
        blocks = _blocks(sizes, order, batch, tokens)
        return SavedLayout(tuple(tensor.shape), tuple(tensor.stride()), order, sizes, gaps, blocks)

    def key(self, tensor: Tensor) -> StorageKey:
        """Return a key that is equal for tensors that show the same numbers of the same storage."""
        cut = self.sizes + self.strides if self.blocks is None else self.blocks
        return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), math.prod(self.sizes), cut

    def by_token(self, tensor: Tensor, batch: int, tokens: int) -> Tensor:
        """Return a tensor of this layout, of any number of tokens, as ``[batch, blocks, tokens, rest]``."""
        return self.in_memory_order(tensor).reshape(batch, self.blocks or 1, tokens, -1)

    def in_memory_order(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this layout with its dimensions in the order of memory, each number once."""
        return _once(tensor).permute(self.order)

    def restore(self, numbers: Tensor) -> Tensor:
        """Return the tensor whose numbers these are, in the order of memory.

        Strides are what they were: kernels round otherwise where numbers lie in another way, and some read wrong ones.
        """
        if not self.gaps:
            numbers = numbers.contiguous()
            return numbers.as_strided(self.shape, self.strides, numbers.storage_offset())
        back = [self.order.index(place) for place in range(len(self.order))]
        once = numbers.reshape(self.sizes).permute(back)
        apart = torch.empty_strided(once.shape, self.strides, dtype=once.dtype, device=once.device).copy_(once)
        return apart.expand(self.shape)


def _once(tensor: Tensor) -> Tensor:
    """Return the first place of each dimension all of whose places are one in memory, and all of the others."""
    for place, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(place, 0, 1)
    return tensor


def token_dimension(shape: Size, batch: int, tokens: int) -> int | None:
    """Return the dimension of a contiguous tensor's ``shape`` that holds tokens of ``batch`` texts; None: none does.

    ``[B, T, ...]``, ``[B, H, T, ...]``, or both in one dimension of ``[B T, ...]``, which is then dimension 0.
    """
    if len(shape) <= 2 and shape[:1] == (batch * tokens,):
        return 0
    if len(shape) < 2 or shape[0] != batch:
        return None
    places = [place for place in (1, 2) if place < len(shape) and shape[place] == tokens]
    if len(shape) == 3 and 1 in places:
        return 1
    return places[0] if len(places) == 1 and (places[0] == 1 or len(shape) > 3) else None


def _blocks(sizes: tuple[int, ...], order: tuple[int, ...], batch: int, tokens: int) -> int | None:
    place = token_dimension(Size(sizes), batch, tokens)
    if place is None:
        return None
    # Of [B, d, T] in memory with d == T nobody could tell which of the two is T.
    if place == 1 and len(sizes) == 3 and sizes[1] == sizes[2] and order != (0, 1, 2):
        return None
    return sizes[1] if place == 2 else 1
