"""Scores of memory rows for texts, without holding the products of every query with every key."""

import torch
import triton
import triton.language as tl

from mplus.backends.triton.configs import Tiles, padded
from mplus.backends.triton.kernels.shared import INTERPRETED, NUMBERS, needs_upcast, on_device


@triton.jit
def _sigmoid(x, ONE_INSTRUCTION: tl.constexpr):
    """Compute a sigmoid in float32; as a tanh it takes one instruction of the special function unit instead of two."""
    if ONE_INSTRUCTION:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        y = 0.5 + 0.5 * tanh
    else:
        y = 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))
    return y


@triton.jit
def score_kernel(
    queries, mask, keys, scores, q_b, q_t, m_b, k_b, k_n, s_b, length, count,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PADDED_WIDTH: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, ONE_INSTRUCTION: tl.constexpr,
):  # fmt: skip
    """Score KEYS keys in one program: they stay while all tokens of a text pass by. Sums are in float32."""
    b = tl.program_id(1).to(tl.int64)
    wide = tl.arange(0, PADDED_WIDTH)
    inside = (wide < WIDTH)[None, :]
    place = tl.arange(0, KEYS)
    start = tl.program_id(0).to(tl.int64) * KEYS
    stored = place < count - start
    k = tl.load(
        keys + b * k_b + start * k_n + place[:, None] * k_n + wide[None, :], mask=stored[:, None] & inside, other=0.0
    ).to(COMPUTE)
    sums = tl.zeros([KEYS], tl.float32)
    tokens = 0
    for first in range(0, length, ROWS):
        token = first + tl.arange(0, ROWS)
        real = token < length
        if MASKED:
            real &= tl.load(mask + b * m_b + token, mask=real, other=0) != 0
        q = tl.load(
            queries + b * q_b + token[:, None] * q_t + wide[None, :], mask=real[:, None] & inside, other=0.0
        ).to(COMPUTE)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        # A token that is not there has products of 0, of which the sigmoid is one half.
        sums += tl.sum(tl.where(real[None, :], _sigmoid(products, ONE_INSTRUCTION), 0.0), 1)
        tokens += tl.sum(real.to(tl.int32), 0)
    tl.store(scores + b * s_b + start + place, sums / tl.maximum(tokens, 1).to(tl.float32), mask=stored)


def launch(
    queries: torch.Tensor,
    mask: torch.Tensor | None,
    keys: torch.Tensor,
    scores: torch.Tensor,
    tiles: Tiles,
    *,
    one_instruction: bool = not INTERPRETED,
) -> None:
    """Run the kernel on arguments that are known to be good: numbers adjacent in the last dimension, no empty tensor.

    Args:
        queries: ``[B, T, r]``.
        mask: ``[B, T]`` bool.
        keys: ``[B or 1, m, r]``.
        scores: ``[B, m]`` float32, written to.
        one_instruction: take the approximate hyperbolic tangent of the GPU, which the interpreter does not have.
    """
    batch, length, width = queries.shape
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    with on_device(queries):
        score_kernel[triton.cdiv(keys.shape[1], tiles.keys), batch](
            queries, queries if mask is None else mask.view(torch.uint8), keys, scores,
            queries.stride(0), queries.stride(1), 0 if mask is None else mask.stride(0),
            0 if keys.shape[0] == 1 else keys.stride(0), keys.stride(1), scores.stride(0), length, keys.shape[1],
            WIDTH=width, MASKED=mask is not None, ROWS=tiles.rows, KEYS=tiles.keys, PADDED_WIDTH=padded(width),
            COMPUTE=tl.float32 if needs_upcast(dtype) else NUMBERS[dtype], PRECISION="ieee",
            ONE_INSTRUCTION=one_instruction, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
