"""Masks that say no more than causality and padding, for kernels that know these and take no mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor

from mplus.backends.joined import text_visibility

if TYPE_CHECKING:
    from mplus.backends.base import AttentionRequest


def without_mask(request: AttentionRequest) -> AttentionRequest | None:
    """The same request with ``padding`` in place of its mask, or None where the mask says something else.

    Queries at padding, which nobody reads, then see no text; what a mask lets them see does not matter.
    """
    mask = request.mask
    if mask is None:
        return request
    if request.padding is not None or (mask.dtype != torch.bool and not _adds_nothing(mask)):
        return None
    visible = text_visibility(evolve(request, window=None))
    if visible.shape[1] > 1 and not bool((visible == visible[:, :1]).all()):
        return None
    visible = visible[:, 0]  # [1 or B, T, S]
    length, text = visible.shape[1:]
    place = torch.arange(text, device=visible.device)
    own = place[text - length :]
    first = visible[:, -1].int().argmax(-1)  # the last query sees all that is no padding
    expected = (place <= own[:, None]) & (place >= first[:, None, None])
    real = own >= first[:, None]
    if not bool((visible == expected)[real].all()):
        return None
    return evolve(request, mask=None, padding=first.expand(request.queries.shape[0]) if bool(first.any()) else None)


def _adds_nothing(mask: Tensor) -> bool:
    """Whether an additive mask is 0 wherever it does not hide; the smallest finite number stands for "hidden"."""
    return bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all())
