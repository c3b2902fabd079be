"""Attention over memory segments and text in one pass, without joining them; forward only."""

import torch
import triton
import triton.language as tl

from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.triton.configs import MOST_SEGMENTS, Tiles, padded
from mplus.backends.triton.kernels.shared import needs_upcast, on_device

LOG2_E = 1.4426950408889634


@triton.jit
def _tanh(x):
    """Compute tanh in float32: near 0 by a series, where the quotient of exponentials would lose its leading digits."""
    square = x * x
    near = x * (1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * (-0.0539682540))))
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.15, near, tl.where(x < 0, -far, far))


@triton.jit
def _real_rows(lengths, index, b, batch, rows, LENGTHS: tl.constexpr):
    """Return the number of real rows of a segment in batch row ``b``."""
    if LENGTHS:
        real = tl.load(lengths + index * batch + b)
        rows = tl.maximum(tl.minimum(real, rows), 0).to(tl.int32)
    return rows


@triton.jit
def attention_kernel(
    queries, text_keys, text_values, keys_0, values_0, keys_1, values_1, keys_2, values_2, keys_3, values_3,
    lengths, padding, bias, output, log_sums,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n,
    k0_b, k0_h, k0_n, v0_b, v0_h, v0_n, k1_b, k1_h, k1_n, v1_b, v1_h, v1_n,
    k2_b, k2_h, k2_n, v2_b, v2_h, v2_n, k3_b, k3_h, k3_n, v3_b, v3_h, v3_n,
    o_s, o_b, o_h, o_t, l_s, l_b, l_h, a_b, a_h,
    batch, length, text, rows_0, rows_1, rows_2, rows_3, window, score_scale, cap,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PADDED_WIDTH: tl.constexpr, PADDED_VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Run one program: ROWS (token, head of the group) pairs of one KV head, over one split of the keys.

    The keys form a row of blocks, [segment 0 | .. | text], of which a split owns a range. A block never spans two
    segments. What a query sees of its block is an interval, ``low`` to ``high``, for memory and text alike.

    ``score_scale`` is the factor on the products and ``cap`` the soft cap, both such that exp2 follows, as ``bias`` is:
    one number for each row of all segments, these one behind the other.
    """
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    h = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    split = tl.program_id(2)
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    token = row // GROUPS
    head = h * GROUPS + row % GROUPS
    place = tl.arange(0, KEYS)
    wide = tl.arange(0, PADDED_WIDTH)
    value_wide = tl.arange(0, PADDED_VALUE_WIDTH)
    real = row < length * GROUPS
    q = tl.load(
        queries + b * q_b + head[:, None] * q_h + token.to(tl.int64)[:, None] * q_t + wide[None, :],
        mask=real[:, None] & (wide < WIDTH)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)

    if BIAS:
        bias += b * a_b + h * a_h
    text_keys += b * k_b + h * k_h
    text_values += b * v_b + h * v_h
    end_0 = 0
    if SEGMENTS > 0:
        keys_0 += b * k0_b + h * k0_h
        values_0 += b * v0_b + h * v0_h
        count_0 = _real_rows(lengths, 0, b, batch, rows_0, LENGTHS)
        end_0 = (count_0 + KEYS - 1) // KEYS
    end_1 = end_0
    if SEGMENTS > 1:
        keys_1 += b * k1_b + h * k1_h
        values_1 += b * v1_b + h * v1_h
        count_1 = _real_rows(lengths, 1, b, batch, rows_1, LENGTHS)
        end_1 = end_0 + (count_1 + KEYS - 1) // KEYS
    end_2 = end_1
    if SEGMENTS > 2:
        keys_2 += b * k2_b + h * k2_h
        values_2 += b * v2_b + h * v2_h
        count_2 = _real_rows(lengths, 2, b, batch, rows_2, LENGTHS)
        end_2 = end_1 + (count_2 + KEYS - 1) // KEYS
    end_3 = end_2
    if SEGMENTS > 3:
        keys_3 += b * k3_b + h * k3_h
        values_3 += b * v3_b + h * v3_h
        count_3 = _real_rows(lengths, 3, b, batch, rows_3, LENGTHS)
        end_3 = end_2 + (count_3 + KEYS - 1) // KEYS

    # The text keys that any row of this program sees.
    own = text - length + token
    text_end = tl.minimum(text, text - length + (first_row + ROWS - 1) // GROUPS + 1)
    text_low = tl.zeros([ROWS], tl.int32)
    text_first = 0
    padded_keys = 0
    if WINDOW:
        text_low = own - window + 1
        text_first = tl.maximum(text - length + first_row // GROUPS - window + 1, 0)
    if PADDING:
        padded_keys = tl.minimum(tl.load(padding + b), text).to(tl.int32)
        text_low = tl.maximum(text_low, padded_keys)
        text_first = tl.maximum(text_first, padded_keys)
    blocks = end_3 + (tl.maximum(text_end - text_first, 0) + KEYS - 1) // KEYS
    splits = tl.num_programs(2)
    share = (blocks + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, blocks)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, PADDED_VALUE_WIDTH], tl.float32)
    for block in range(first, last):
        in_text = block >= end_3
        start = text_first + (block - end_3) * KEYS
        count = text_end
        before = 0  # rows of the segments in front of this one
        key_base, value_base = text_keys, text_values
        key_stride, value_stride = k_n, v_n
        if SEGMENTS > 3:
            here = block < end_3
            start = tl.where(here, (block - end_2) * KEYS, start)
            count = tl.where(here, count_3, count)
            before = tl.where(here, rows_0 + rows_1 + rows_2, before)
            key_base, value_base = tl.where(here, keys_3, key_base), tl.where(here, values_3, value_base)
            key_stride, value_stride = tl.where(here, k3_n, key_stride), tl.where(here, v3_n, value_stride)
        if SEGMENTS > 2:
            here = block < end_2
            start = tl.where(here, (block - end_1) * KEYS, start)
            count = tl.where(here, count_2, count)
            before = tl.where(here, rows_0 + rows_1, before)
            key_base, value_base = tl.where(here, keys_2, key_base), tl.where(here, values_2, value_base)
            key_stride, value_stride = tl.where(here, k2_n, key_stride), tl.where(here, v2_n, value_stride)
        if SEGMENTS > 1:
            here = block < end_1
            start = tl.where(here, (block - end_0) * KEYS, start)
            count = tl.where(here, count_1, count)
            before = tl.where(here, rows_0, before)
            key_base, value_base = tl.where(here, keys_1, key_base), tl.where(here, values_1, value_base)
            key_stride, value_stride = tl.where(here, k1_n, key_stride), tl.where(here, v1_n, value_stride)
        if SEGMENTS > 0:
            here = block < end_0
            start = tl.where(here, block * KEYS, start)
            count = tl.where(here, count_0, count)
            before = tl.where(here, 0, before)
            key_base, value_base = tl.where(here, keys_0, key_base), tl.where(here, values_0, value_base)
            key_stride, value_stride = tl.where(here, k0_n, key_stride), tl.where(here, v0_n, value_stride)

        # Offsets of a whole memory may need 64 bits; those within a block do not.
        stored = place < count - start
        k = tl.load(
            key_base + start.to(tl.int64) * key_stride + place[:, None] * key_stride + wide[None, :],
            mask=stored[:, None] & (wide < WIDTH)[None, :],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        if SOFTCAP:
            scores = _tanh(scores) * cap
        if BIAS:  # noqa: SIM102 - a constant, which decides what is compiled
            if block < end_3:  # text has none; a branch, since a mask for it costs registers that there are not
                added = tl.load(bias + (before + start) + place, mask=stored, other=0.0)
                scores += added[None, :]
        high = tl.where(in_text, own, count - 1)
        seen = (start + place)[None, :] <= high[:, None]
        if WINDOW or PADDING:
            low = tl.where(in_text, text_low, 0)
            seen &= (start + place)[None, :] >= low[:, None]
        scores = tl.where(seen, scores, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, 1))
        # A row that has not seen any key yet has no largest score, and -inf - -inf would be NaN.
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        shares = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(largest - finite)
        total = total * shrink + tl.sum(shares, 1)
        v = tl.load(
            value_base + start.to(tl.int64) * value_stride + place[:, None] * value_stride + value_wide[None, :],
            mask=stored[:, None] & (value_wide < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        if UPCAST:
            v = v.to(tl.float32)
        weighted = tl.dot(shares.to(v.dtype), v, weighted * shrink[:, None], input_precision=PRECISION)
        largest = larger

    some = tl.where(total > 0, total, 1.0)
    log_sum = tl.where(total > 0, (largest + tl.log2(some)) * 0.6931471805599453, float("-inf"))
    tl.store(
        output + split * o_s + b * o_b + head[:, None] * o_h + token.to(tl.int64)[:, None] * o_t + value_wide[None, :],
        (weighted / some[:, None]).to(output.dtype.element_ty),
        mask=real[:, None] & (value_wide < VALUE_WIDTH)[None, :],
    )
    tl.store(log_sums + split * l_s + b * l_b + head * l_h + token, log_sum, mask=real)


def launch(
    request: AttentionRequest, segments: tuple[Segment, ...], output: torch.Tensor, log_sums: torch.Tensor, tiles: Tiles
) -> None:
    """Run the kernel on arguments that are known to be good: numbers adjacent in the last dimension, no empty segment.

    Args:
        request: its segments and sinks are left out of account.
        output: ``[splits, B, H, T, Dv]``, written to: the output of each split of the keys by itself.
        log_sums: ``[splits, B, H, T]`` float32, written to: the logarithm of the sum of the exponentials of the
            scores in each split; -inf where it has no key that the query sees.
    """
    queries, keys, values = request.queries, request.keys, request.values
    batch, heads, length, width = queries.shape
    key_heads, text, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    groups = heads // key_heads
    filled = [*segments, *[Segment(keys, values)] * (MOST_SEGMENTS - len(segments))]
    pairs = [part for segment in filled for part in (segment.keys, segment.values)]
    lengths, bias = _lengths(segments, batch), _bias(segments)
    softcap = request.softcap
    grid = (triton.cdiv(length * groups, tiles.rows), batch * key_heads, output.shape[0])
    with on_device(queries):
        attention_kernel[grid](
            queries, keys, values, *pairs,
            queries if lengths is None else lengths,
            queries if request.padding is None else request.padding,
            queries if bias is None else bias,
            output, log_sums,
            *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            *[stride for part in pairs for stride in _strides(part, 3)],
            *output.stride()[:4], *log_sums.stride()[:3], *((0, 0) if bias is None else _strides(bias, 2)),
            batch, length, text, *[segment.keys.shape[2] for segment in filled], request.window or 0,
            request.scale * LOG2_E if softcap is None else request.scale / softcap,
            0.0 if softcap is None else softcap * LOG2_E,
            KV_HEADS=key_heads, GROUPS=groups, WIDTH=width, VALUE_WIDTH=value_width,
            SEGMENTS=len(segments), LENGTHS=lengths is not None, WINDOW=request.window is not None,
            PADDING=request.padding is not None, SOFTCAP=softcap is not None, BIAS=bias is not None,
            ROWS=tiles.rows, KEYS=tiles.keys, PADDED_WIDTH=padded(width), PADDED_VALUE_WIDTH=padded(value_width),
            PRECISION="ieee", UPCAST=needs_upcast(queries.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def _strides(part: torch.Tensor, axes: int) -> list[int]:
    """Return the strides over the first ``axes`` axes; 0 over an axis of one entry, which all read."""
    return [0 if size == 1 else stride for size, stride in zip(part.shape[:axes], part.stride()[:axes], strict=True)]


def _lengths(segments: tuple[Segment, ...], batch: int) -> torch.Tensor | None:
    """Return the lengths of segments, ``[segments, B]`` int64; None when all rows are real."""
    given = next((segment.lengths for segment in segments if segment.lengths is not None), None)
    if given is None:
        return None
    return torch.stack(
        [
            given.new_full((batch,), segment.keys.shape[2]) if segment.lengths is None else segment.lengths
            for segment in segments
        ]
    )


def _bias(segments: tuple[Segment, ...]) -> torch.Tensor | None:
    """Return ``[1 or B, 1 or Hkv, rows of all segments]`` float32 for exp2, 0 where one has none; None: all."""
    given = next((segment.bias for segment in segments if segment.bias is not None), None)
    if given is None:
        return None
    parts = [
        given.new_zeros(1, 1, segment.keys.shape[2]) if segment.bias is None else segment.bias for segment in segments
    ]
    shape = torch.broadcast_shapes(*(part.shape[:2] for part in parts))
    return torch.cat([part.float().expand(*shape, -1) for part in parts], dim=-1) * LOG2_E
