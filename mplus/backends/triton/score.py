"""The score ``mean_t sigmoid(q_t . k_j)`` of many rows, checked and started; and the same in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mplus.backends.measured import reasons_measured
from mplus.backends.triton.configs import WIDEST, Tiles, score_tiles
from mplus.backends.triton.usable import reasons_against
from mplus.errors import InputError, NotSupported

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


def plain_sigmoid_means(queries: Tensor, mask: Tensor | None, keys: Tensor) -> Tensor:
    """Compute what the kernel must. Arguments and result as for ``sigmoid_means``, any dtype and device."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    if mask is None:
        mask = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    products = queries.to(dtype).masked_fill(~mask[..., None], 0) @ keys.to(dtype).mT
    likes = products.sigmoid().masked_fill(~mask[..., None], 0)
    return likes.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def sigmoid_means(
    queries: Tensor, mask: Tensor | None, keys: Tensor, *, tiles: Tiles | None = None, interpret: bool = False
) -> Tensor:
    """Compute ``mean_t sigmoid(q_t . k_j)`` over the tokens of each text (M+ section 3.2); no products are stored.

    Args:
        queries: ``[B, T, r]`` in float16, bfloat16 or float32.
        mask: ``[B, T]`` bool, True at text and False at padding, whatever that holds; None: all is text.
        keys: ``[m, r]``, the same for every text, or ``[B, m, r]``; products are in the wider dtype of the two.
        tiles: None: those the kernel ships with.
        interpret: see ``reasons_against``.

    Returns:
        ``[B, m]`` float32; 0 for a text without any token.

    Raises:
        InputError: the shapes do not fit together, or the mask is not bool.
        NotSupported: the device, the dtype or the width is none the kernel takes.
    """
    _check(queries, mask, keys)
    reasons = reasons_against_scoring(queries, keys, interpret=interpret)
    if reasons:
        raise NotSupported(f"the kernel cannot score {list(queries.shape)} x {list(keys.shape)}: {'; '.join(reasons)}")
    from mplus.backends.triton.kernels.score import launch

    if keys.dim() == 2:
        keys = keys[None]
    scores = torch.zeros(queries.shape[0], keys.shape[1], dtype=torch.float32, device=queries.device)
    if not scores.numel() or not queries.shape[1]:
        return scores
    if tiles is None:
        widest = max(queries.dtype.itemsize, keys.dtype.itemsize)
        tiles = score_tiles(8 * widest, queries.shape[2])
    launch(_adjacent(queries), None if mask is None else _adjacent(mask), _adjacent(keys), scores, tiles)
    return scores


def reasons_against_scoring(queries: Tensor, keys: Tensor, *, interpret: bool = False) -> list[str]:
    """Return why the kernel cannot take these; empty when it can."""
    reasons = reasons_against(queries.device, interpret=interpret) or reasons_measured(queries.device, "score")
    if keys.device != queries.device:
        reasons.append(f"queries are on {queries.device} and keys on {keys.device}")
    reasons += [
        f"{name} are {part.dtype}: the kernel takes float16, bfloat16 and float32"
        for name, part in (("queries", queries), ("keys", keys))
        if part.dtype not in DTYPES
    ]
    if queries.shape[-1] > WIDEST:
        reasons.append(f"width {queries.shape[-1]}: the kernel takes {WIDEST} at most")
    return reasons


def _check(queries: Tensor, mask: Tensor | None, keys: Tensor) -> None:
    fits = queries.dim() == 3 and keys.dim() in (2, 3) and queries.shape[-1] == keys.shape[-1] >= 1
    if not fits or (keys.dim() == 3 and keys.shape[0] not in (1, queries.shape[0])):
        raise InputError(
            "queries must be [B, T, r] and keys [m, r] or [B, m, r], "
            f"got queries {list(queries.shape)} and keys {list(keys.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != queries.shape[:2]):
        raise InputError(
            f"mask must be {list(queries.shape[:2])} bool, as the queries, got {list(mask.shape)} {mask.dtype}"
        )
    if mask is not None and mask.device != queries.device:
        raise InputError(f"mask must be on the device of the queries ({queries.device}), got {mask.device}")


def _adjacent(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()
