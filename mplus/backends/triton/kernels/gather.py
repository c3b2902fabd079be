"""Bringing stored rows into place: gathered, split into keys and values, and the keys rotated, in one pass."""

import torch
import triton
import triton.language as tl

from mplus.backends.triton.configs import Tiles, padded
from mplus.backends.triton.kernels.shared import needs_upcast, on_device


@triton.jit
def gather_kernel(
    rows, indices, cos, sin, keys, values, r_n, c_n, s_n, k_h, k_n, v_h, v_n, stored, count,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, PADDED_WIDTH: tl.constexpr, PADDED_VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy ROWS rows of one head in one program. Rotation is computed in float32 and rounded once."""
    h = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = slot < count
    index = tl.load(indices + slot, mask=real, other=0)
    # What has no row is read as zeros, not from elsewhere.
    there = real & (index >= 0) & (index < stored)
    base = rows + index * r_n

    wide = tl.arange(0, PADDED_WIDTH)
    inside = real[:, None] & (wide < WIDTH)[None, :]
    mine = base + h * WIDTH
    found = there[:, None] & (wide < WIDTH)[None, :]
    k = tl.load(mine[:, None] + wide[None, :], mask=found, other=0.0)
    if ROTATED > 0:
        # The number that each one is turned with stands half a rotation further, or half a rotation before.
        half: tl.constexpr = ROTATED // 2
        other = tl.where(wide < half, wide + half, wide - half)
        turned = (wide < ROTATED)[None, :]
        partner = tl.load(mine[:, None] + other[None, :], mask=there[:, None] & turned, other=0.0)
        c = tl.load(cos + slot[:, None] * c_n + wide[None, :], mask=real[:, None] & turned, other=1.0)
        s = tl.load(sin + slot[:, None] * s_n + wide[None, :], mask=real[:, None] & turned, other=0.0)
        sign = tl.where(wide < half, -1.0, 1.0)[None, :]
        k = k.to(tl.float32) * c.to(tl.float32) + partner.to(tl.float32) * s.to(tl.float32) * sign
    tl.store(keys + h * k_h + slot[:, None] * k_n + wide[None, :], k.to(keys.dtype.element_ty), mask=inside)

    value_wide = tl.arange(0, PADDED_VALUE_WIDTH)
    value_inside = (value_wide < VALUE_WIDTH)[None, :]
    v = tl.load(
        (base + HEADS * WIDTH + h * VALUE_WIDTH)[:, None] + value_wide[None, :],
        mask=there[:, None] & value_inside,
        other=0.0,
    )
    tl.store(
        values + h * v_h + slot[:, None] * v_n + value_wide[None, :],
        v.to(values.dtype.element_ty),
        mask=real[:, None] & value_inside,
    )


def launch(
    rows: torch.Tensor,
    indices: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Tiles,
) -> None:
    """Run the kernel on arguments that are known to be good: numbers adjacent in the last dimension, no empty tensor.

    Args:
        rows: ``[M, Hkv * (D + Dv)]``, the keys of all heads, then the values.
        indices: ``[n]`` int64.
        cos, sin: ``[n, R]``; R may be 0.
        keys, values: ``[Hkv, n, D]`` and ``[Hkv, n, Dv]``, written to.
    """
    heads, count, width = keys.shape
    value_width = values.shape[2]
    # The interpreter cuts off what does not fit into bfloat16, so there torch rounds.
    rounded = keys.float() if needs_upcast(keys.dtype) else keys
    with on_device(rows):
        gather_kernel[triton.cdiv(count, tiles.rows), heads](
            rows, indices, cos, sin, rounded, values, rows.stride(0), cos.stride(0), sin.stride(0),
            rounded.stride(0), rounded.stride(1), values.stride(0), values.stride(1), rows.shape[0], count,
            HEADS=heads, WIDTH=width, VALUE_WIDTH=value_width, ROTATED=cos.shape[1],
            ROWS=tiles.rows, PADDED_WIDTH=padded(width), PADDED_VALUE_WIDTH=padded(value_width),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    if rounded is not keys:
        keys.copy_(rounded)
