"""Stored rows into a prefix: gathered, split and rotated in one pass, checked and started; and in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mplus.backends.measured import reasons_measured
from mplus.backends.triton.configs import WIDEST, Tiles, gather_tiles
from mplus.backends.triton.usable import reasons_against
from mplus.errors import InputError, NotSupported

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


def plain_gather_rotated(rows: Tensor, indices: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> None:
    """Compute what the kernel must. Arguments as for ``gather_rotated``, any dtype and device."""
    _check(rows, indices, cos, sin, keys, values)
    heads, count, width = keys.shape
    picked = rows[indices]
    old = picked[:, : heads * width].view(count, heads, width).transpose(0, 1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    turned, kept = old[..., : cos.shape[1]].to(dtype), old[..., cos.shape[1] :]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos.to(dtype) + torch.cat([-high, low], dim=-1) * sin.to(dtype)
    keys.copy_(torch.cat([turned.to(keys.dtype), kept.to(keys.dtype)], dim=-1))
    values.copy_(picked[:, heads * width :].view(count, heads, values.shape[2]).transpose(0, 1))


def gather_rotated(
    rows: Tensor,
    indices: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> None:
    """Write the rows at ``indices`` into a range of slots, with the keys rotated.

    Args:
        rows: ``[M, Hkv * (D + Dv)]`` in float16, bfloat16 or float32: the keys of all heads, not rotated, then the
            values.
        indices: ``[n]`` int64 from 0 to M - 1. On a GPU they are not looked at, which would make it wait; a row that
            is not there comes out as zeros.
        cos, sin: ``[n, R]`` for the positions of the slots, in any of the dtypes. The first R numbers of each head are
            rotated, halves against each other as in transformers' ``rotate_half``; the others stay. R is even and may
            be 0.
        keys, values: ``[Hkv, n, D]`` and ``[Hkv, n, Dv]`` in the dtype of the rows, written to; may be strided.
        tiles: None: those the kernel ships with.
        interpret: see ``reasons_against``.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or an index is out of range.
        NotSupported: the device, the dtype or the width is none the kernel takes.
    """
    _check(rows, indices, cos, sin, keys, values)
    width = max(keys.shape[2], values.shape[2])
    reasons = reasons_against_gathering(rows, cos, sin, width, interpret=interpret)
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        reasons.append("the numbers of a head are not adjacent in the buffers written to")
    if reasons:
        raise NotSupported(f"the kernel cannot gather from {list(rows.shape)}: {'; '.join(reasons)}")
    from mplus.backends.triton.kernels.gather import launch

    if indices.numel():
        launch(
            _adjacent(rows),
            indices.contiguous(),
            _adjacent(cos),
            _adjacent(sin),
            keys,
            values,
            gather_tiles(width) if tiles is None else tiles,
        )


def reasons_against_gathering(
    rows: Tensor, cos: Tensor, sin: Tensor, width: int, *, interpret: bool = False
) -> list[str]:
    """Return why the kernel cannot take these, with heads of ``width``; empty when it can."""
    reasons = reasons_against(rows.device, interpret=interpret) or reasons_measured(rows.device, "gather")
    reasons += [
        f"{name} is {part.dtype}: the kernel takes float16, bfloat16 and float32"
        for name, part in (("rows", rows), ("cos", cos), ("sin", sin))
        if part.dtype not in DTYPES
    ]
    if width > WIDEST:
        reasons.append(f"heads of width {width}: the kernel takes {WIDEST} at most")
    return reasons


def _check(rows: Tensor, indices: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> None:
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2] or 0 in (*keys.shape[::2],):
        raise InputError(
            f"keys and values must be [heads, slots, width], got {list(keys.shape)} and {list(values.shape)}"
        )
    heads, count, width = keys.shape
    wanted = heads * (width + values.shape[2])
    if rows.dim() != 2 or rows.shape[1] != wanted or not values.shape[2]:
        raise InputError(f"rows must be [stored rows, {wanted}], as keys and values, got {list(rows.shape)}")
    if tuple(indices.shape) != (count,) or indices.dtype != torch.int64:
        raise InputError(f"indices must be [{count}] int64, one per slot, got {list(indices.shape)} {indices.dtype}")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != count or cos.shape[1] % 2 or cos.shape[1] > width:
        raise InputError(
            f"cos and sin must be [{count}, an even number up to {width}], got {list(cos.shape)} and {list(sin.shape)}"
        )
    for name, part in (("keys", keys), ("values", values)):
        if part.dtype != rows.dtype:
            raise InputError(f"{name} must be {rows.dtype}, as the rows, got {part.dtype}")
    named = {"indices": indices, "cos": cos, "sin": sin, "keys": keys, "values": values}
    for name, part in named.items():
        if part.device != rows.device:
            raise InputError(f"{name} must be on the device of the rows ({rows.device}), got {part.device}")
    if indices.device.type == "cpu" and count and not 0 <= int(indices.min()) <= int(indices.max()) < rows.shape[0]:
        raise InputError(
            f"indices must be from 0 to {rows.shape[0] - 1}, got {int(indices.min())} to {int(indices.max())}"
        )


def _adjacent(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()
