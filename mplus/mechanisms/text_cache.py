"""TextCache: what a mechanism keeps of the tokens that were read, beside the decoder's key/value cache."""

from __future__ import annotations

from typing import Protocol

import torch
from attrs import define, field
from torch import Tensor


class TextCache(Protocol):
    """Kept by ``MemoryMechanism.finish``; follows the decoder's key/value cache.

    It is copied with that one (``copy.deepcopy``) and dropped with it.
    """

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, ``[n]`` int64, in this order: beams that are reordered, or copies of a row."""

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens of each row."""


@define(eq=False)
class TokenTensors(TextCache):
    """A ``TextCache`` of tensors with one entry for each token, ``[B, S, ...]``, such as keys and values.

    Example:
        >>> cache = TokenTensors()
        >>> cache.append("keys", torch.zeros(2, 5, 8)).shape, cache.append("keys", torch.zeros(2, 1, 8)).shape
        (torch.Size([2, 5, 8]), torch.Size([2, 6, 8]))
        >>> cache.select(torch.tensor([1, 1, 1]))
        >>> cache["keys"].shape
        torch.Size([3, 6, 8])
    """

    tensors: dict[str, Tensor] = field(factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def append(self, name: str, new: Tensor) -> Tensor:
        """Add the entries ``[B, T, ...]`` of new tokens to the tensor ``name``, and return all of it."""
        before = self.tensors.get(name)
        self.tensors[name] = new if before is None else torch.cat([before, new], 1)
        return self.tensors[name]

    def select(self, rows: Tensor) -> None:
        self.tensors = {name: tensor[rows.to(tensor.device)] for name, tensor in self.tensors.items()}

    def crop(self, tokens: int) -> None:
        self.tensors = {name: tensor[:, :tokens] for name, tensor in self.tensors.items()}
