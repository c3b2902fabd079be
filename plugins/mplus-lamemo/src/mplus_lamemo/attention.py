"""Attention that can be gone on with: its log-sum-exp, the merge of two of them, and who looks ahead to what."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.errors import InputError


@define(frozen=True, eq=False)
class Attention:
    """Attention of n places to some keys, which can be merged with that to others.

    Attributes:
        vectors: ``[B, H, n, D]``, weighted values; zeros where a place saw nothing.
        mass: ``[B, H, n]``, the logarithm of the sum of the exponentials of all scores; minus infinity there.

    Example:
        >>> one = attended(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0], [3.0]]]]))
        >>> two = attended(torch.zeros(1, 1, 1, 1), torch.tensor([[[[6.0]]]]))
        >>> merged(one, two)[0].vectors.flatten().tolist()
        [3.0]
    """

    vectors: Tensor
    mass: Tensor

    def newest(self, count: int) -> Attention:
        """Return the last ``count`` places."""
        first = max(self.mass.shape[2] - count, 0)
        return Attention(self.vectors[:, :, first:], self.mass[:, :, first:])

    def detach(self) -> Attention:
        """Return the same without its graph: no gradient reaches an earlier segment."""
        return Attention(self.vectors.detach(), self.mass.detach())

    @staticmethod
    def cat(parts: Sequence[Attention]) -> Attention:
        """Return the places of all parts, one behind the other."""
        return Attention(torch.cat([one.vectors for one in parts], 2), torch.cat([one.mass for one in parts], 2))


def weights(scores: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the softmax ``[B, H, n, S]`` of scores of that shape, and its log-sum-exp ``[B, H, n]``.

    Args:
        scores: one for each place and key.
        visible: bool, which can be expanded to that shape; False: the place does not see the key. None: all do.

    A place that sees nothing has weights of 0 and a log-sum-exp of minus infinity, and no gradient.
    """
    if visible is None:
        return scores.softmax(-1), scores.logsumexp(-1)
    sees = visible.expand(scores.shape)
    some = sees.any(-1)
    # A softmax over nothing has no gradient but NaN: such places see all keys here, and nothing of it is used.
    masked = scores.masked_fill(~sees & some[..., None], -math.inf)
    return masked.softmax(-1) * some[..., None], masked.logsumexp(-1).masked_fill(~some, -math.inf)


def attended(scores: Tensor, values: Tensor, visible: Tensor | None = None) -> Attention:
    """Return the attention of scores ``[B, H, n, S]`` to values ``[B, H, S, D]``; ``visible`` as in ``weights``."""
    found, mass = weights(scores, visible)
    return Attention(found @ values, mass)


def merged(carried: Attention, new: Attention, epsilon: float = 0.0) -> tuple[Attention, Tensor]:
    """Merge what places carry with what they find now: the attention to the keys of both, if these are others.

    Args:
        carried: of n places; each has seen a key.
        new: of the same places; some may have seen nothing.
        epsilon: added below the fraction of the weight, and not to the mass (the released code: 1e-6).

    Returns:
        The attention to both, and the weight ``[B, H, n]`` of what was carried.
    """
    if not epsilon:
        alpha = torch.sigmoid(carried.mass - new.mass)
    else:
        most = torch.maximum(carried.mass, new.mass)
        old, found = (carried.mass - most).exp(), (new.mass - most).exp()
        alpha = old / (old + found + epsilon)
    vectors = alpha[..., None] * carried.vectors + (1 - alpha)[..., None] * new.vectors
    return Attention(vectors, torch.logaddexp(carried.mass, new.mass)), alpha


def lookahead_keys(memory: int, keys: int, ahead: int) -> tuple[int, int]:
    """Return the first key that places of memory look ahead to, and the first one behind the last.

    The last one is the first token of the segment, so that no place knows what text must not know yet. With ``ahead``
    the length of the segment before, every pair of a place and a key behind it is seen once, whatever the lengths: the
    places have looked at its first token already, and at none of the others. The released code takes the length of the
    present segment, which is right only where it never changes.

    Args:
        memory: places in memory, numbered 0, 1, ...
        keys: places in memory and tokens of the segment together.
        ahead: keys that the places have not looked at, the first token of the segment included.

    Raises:
        InputError: a number is negative, or there are fewer keys than places.

    Example:
        >>> lookahead_keys(memory=6, keys=9, ahead=3)
        (4, 7)
        >>> lookahead_keys(memory=6, keys=6, ahead=3)  # there is no segment
        (4, 6)
    """
    if not 0 <= memory <= keys or ahead < 0:
        raise InputError(f"a look-ahead needs 0 <= memory <= keys and ahead >= 0, got {memory}, {keys} and {ahead}")
    return max(memory - ahead, 0) + 1, min(memory + 1, keys)


def looks_ahead(memory: int, first: int, behind: int, device: torch.device | None = None) -> Tensor:
    """Return ``[memory, behind - first]`` bool: which of the keys ``first .. behind - 1`` lie behind each place."""
    keys = torch.arange(first, max(behind, first), device=device)
    return keys[None] > torch.arange(memory, device=device)[:, None]


def causal(memory: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Return ``[keys - memory, keys]`` bool: the text sees memory, and of itself what is not behind."""
    return torch.arange(keys, device=device)[None] <= torch.arange(memory, keys, device=device)[:, None]
