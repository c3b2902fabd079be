"""The parts that a request is attended to in: memory, a segment at a time, and text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.backends.checks import mixed_dtypes
from mplus.backends.joined import text_bias, text_visibility

if TYPE_CHECKING:
    from mplus.backends.base import AttentionRequest

KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
"""The kernel behind PyTorch's own attention on the CPU; not public, and it checks little of what it is given."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mergeable(request: AttentionRequest) -> list[str]:
    """Return why PyTorch's CPU kernel cannot attend to the parts of ``request``; empty when it can."""
    queries = request.queries
    reasons = []
    if queries.device.type != "cpu":
        reasons.append(f"queries are on {queries.device}: partial attention with its log-sum-exp is for the CPU")
    if not hasattr(torch.ops.aten, KERNEL):
        reasons.append(f"torch {torch.__version__} has no attention kernel for the CPU that returns log-sum-exps")
    if queries.dtype not in DTYPES:
        reasons.append(f"queries are {queries.dtype}: the kernel takes {', '.join(map(str, DTYPES))}")
    reasons += mixed_dtypes(request, "the kernel", biases=True)
    if request.values.shape[-1] != queries.shape[-1]:
        reasons.append(
            f"values have width {request.values.shape[-1]} and keys {queries.shape[-1]}: the kernel takes one width"
        )
    return reasons


@define(frozen=True, eq=False)
class Part:
    """Keys and values that some batch rows attend to.

    Attributes:
        keys, values: ``[B or 1, Hkv, P, D]``; empty where they were taken out to be saved for backward.
        rows: the batch rows concerned; None: all of them.
        count: only the first so many keys are real.
        bias: ``[B or 1, H or 1, T, S]`` added to the scores, -inf where nothing is seen; None: all keys are seen, or
            with ``causal`` those up to a query's own place.
        key_bias: ``[B or 1, Hkv or 1, 1, P]`` added to the scores of each key, whatever the query; of memory only.
        blind: ``[B or 1, H or 1, T]`` bool, queries that see none of the keys; None: there are none.
        causal: key s is seen by the queries from s on.
    """

    keys: Tensor
    values: Tensor
    rows: slice | None = None
    count: int | None = None
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    blind: Tensor | None = None
    causal: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The keys and values, which gradients go to."""
        return self.keys, self.values

    @property
    def partial(self) -> bool:
        """True where some queries do not attend to this part."""
        return self.rows is not None or self.blind is not None

    def without_tensors(self) -> Part:
        """Return a copy without keys and values, to be kept for backward beside the tensors that autograd saves."""
        nothing = self.keys.new_empty(0)
        return evolve(self, keys=nothing, values=nothing)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend with queries ``[B, H, T, D]`` to this part alone; return the output and log-sum-exp ``[B, H, T]``."""
        batch, heads, length, _ = queries.shape
        mine = queries if self.rows is None else queries[self.rows]
        keys, values = self._own(keys), self._own(values)
        if self._packed:
            output, lse = _kernel(pack(mine, keys), keys, values, self.key_bias, causal=False, scale=scale)
            output, lse = unpack(output, mine.shape), unpack(lse, mine.shape[:3])
        else:
            # With a bias for each query the group cannot be folded into the length, so keys are repeated.
            keys, values = (_per_query_head(rows, heads) for rows in (keys, values))
            output, lse = _kernel(mine, keys, values, self.bias, self.causal, scale)
        if self.blind is not None:
            # Whatever the kernel says of a query that sees nothing, its share of the whole is none.
            lse = lse.masked_fill(self.blind, -torch.inf)
        if self.rows is None:
            return output, lse
        whole = queries.new_zeros(batch, heads, length, output.shape[-1])
        whole[self.rows] = output
        lse_of_all = lse.new_full((batch, heads, length), -torch.inf)
        lse_of_all[self.rows] = lse
        return whole, lse_of_all

    def backward(
        self,
        gradient: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        total: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of queries, keys and values, given output and log-sum-exp of the whole attention."""
        heads = queries.shape[1]
        rows = slice(None) if self.rows is None else self.rows
        dout, q, o, lse = gradient[rows], queries[rows], output[rows], total[rows]
        k, v = self._own(keys), self._own(values)
        if self._packed:
            shape, packed = q.shape, (pack(part, k) for part in (dout, q, o, lse))
            dout, q, o, lse = packed
            dq, dk, dv = _kernel_backward(dout, q, k, v, o, lse, self.key_bias, causal=False, scale=scale)
            dq = unpack(dq, shape)
        else:
            groups = heads // k.shape[1]
            k, v = _per_query_head(k, heads), _per_query_head(v, heads)
            dq, dk, dv = _kernel_backward(dout, q, k, v, o, lse, self.bias, self.causal, scale)
            dk, dv = (part.unflatten(1, (-1, groups)).sum(2) for part in (dk, dv))
        whole = torch.zeros_like(queries)
        whole[rows] = dq
        return whole, self._whole(dk, keys), self._whole(dv, values)

    @property
    def _packed(self) -> bool:
        return self.bias is None and not self.causal

    def _own(self, part: Tensor) -> Tensor:
        if self.rows is not None and part.shape[0] > 1:
            part = part[self.rows]
        return part if self.count is None else part[:, :, : self.count]

    def _whole(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Spread a gradient of what ``_own`` took over the whole tensor, with zeros elsewhere."""
        if gradient.shape == like.shape:
            return gradient
        whole = torch.zeros_like(like)
        self._own(whole).copy_(gradient)
        return whole


def parts_of(request: AttentionRequest) -> list[Part]:
    """Return the parts of a request: memory, oldest first, and text."""
    if request.joined is not None and request.queries.shape[2] == 1 and request.joined.worthwhile:
        text = _text(request)
        biased = any(segment.bias is not None for segment in request.segments)
        plain = text.keys is request.keys and not text.partial and text.bias is None  # the token sees all text
        if plain and not biased:
            return [Part(*request.joined.keys_values())]
    parts: list[Part] = []
    for segment in request.segments:
        count, bias = segment.keys.shape[2], segment.bias
        if not count:
            continue
        # Rows of a batch that share keys are packed into one, which cannot have a bias for each.
        apart = bias is not None and bias.shape[0] > segment.keys.shape[0]
        if segment.lengths is None and not apart:
            parts.append(Part(segment.keys, segment.values, key_bias=_key_bias(bias)))
            continue
        # A part per stream: packed queries all see the same keys, and lengths differ.
        counts = [count] * request.queries.shape[0] if segment.lengths is None else segment.lengths.tolist()
        parts += [
            Part(segment.keys, segment.values, slice(row, row + 1), real, key_bias=_key_bias(bias, row, real))
            for row, real in enumerate(counts)
            if real
        ]
    return [*parts, _text(request)]


def _key_bias(bias: Tensor | None, row: int | None = None, count: int | None = None) -> Tensor | None:
    """Return a segment's bias, of one batch row and its real keys where these are given, as the kernel takes it."""
    if bias is None:
        return None
    own = bias if row is None or bias.shape[0] == 1 else bias[row : row + 1]
    return own[:, :, None, :count].contiguous()


def _text(request: AttentionRequest) -> Part:
    keys, values = request.keys, request.values
    length, text = request.queries.shape[2], keys.shape[2]
    plain = request.mask is None and request.padding is None
    if plain and (request.window is None or request.window >= text):
        if length == 1:
            return Part(keys, values)
        if length == text:
            return Part(keys, values, causal=True)
    if plain and length == 1 and request.window is not None:
        return Part(keys[:, :, -request.window :], values[:, :, -request.window :])
    visible = text_visibility(request)
    added = text_bias(request)
    bias = torch.zeros((), dtype=request.queries.dtype) if added is None else added
    blind = ~visible.any(-1)
    bias = bias.to(request.queries.dtype).masked_fill(~visible, -torch.inf)
    bias = bias[(None,) * (4 - bias.dim())]
    return Part(keys, values, bias=bias, blind=blind if bool(blind.any()) else None)


def pack(part: Tensor, keys: Tensor) -> Tensor:
    """Fold ``[B, H, T, ...]`` to ``[B, Hkv, G T, ...]``, or ``[1, Hkv, B G T, ...]`` for keys that the batch shares."""
    batch, heads, length = part.shape[:3]
    key_heads = keys.shape[1]
    if keys.shape[0] == batch:
        return part.reshape(batch, key_heads, heads // key_heads * length, *part.shape[3:])
    # Heads of keys first: the batch's queries then stand one behind the other under each of them.
    grouped = part.reshape(batch, key_heads, heads // key_heads * length, *part.shape[3:])
    return grouped.transpose(0, 1).reshape(1, key_heads, batch * grouped.shape[2], *part.shape[3:])


def unpack(part: Tensor, shape: torch.Size) -> Tensor:
    """Undo ``pack``, to ``shape`` ``[B, H, T, ...]``."""
    batch, heads, length = shape[:3]
    if part.shape[0] == batch:
        return part.reshape(shape)
    key_heads = part.shape[1]
    grouped = part.reshape(key_heads, batch, heads // key_heads * length, *part.shape[3:])
    return grouped.transpose(0, 1).reshape(shape)


def _per_query_head(part: Tensor, heads: int) -> Tensor:
    return part if part.shape[1] == heads else part.repeat_interleave(heads // part.shape[1], dim=1)


def _kernel(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = getattr(torch.ops.aten, KERNEL)(
        queries, keys, values, 0.0, causal, attn_mask=bias, scale=scale
    )
    return found


def _kernel_backward(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = getattr(torch.ops.aten, f"{KERNEL}_backward")(
        gradient, queries, keys, values, output, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    return found
