"""TritonBackend: attention over memory and text in one kernel, without joining them."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import evolve

from mplus.backends.base import AttentionBackend, AttentionRequest, AttentionResult
from mplus.backends.checks import mixed_dtypes
from mplus.backends.joined import text_visibility
from mplus.backends.triton.configs import MOST_SEGMENTS, WIDEST
from mplus.backends.triton.usable import reasons_against

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonBackend(AttentionBackend):
    """One pass over memory segments and text where they lie; what the batch shares is not repeated.

    Gradients are computed in plain torch, a chunk of the keys at a time. Never run on a GPU yet: the kernel is checked
    by an interpreter, and compiled for GPUs that are not there (see the page on kernels).

    Args:
        interpret: take tensors on the CPU, by Triton's interpreter, which TRITON_INTERPRET=1 turns on before triton is
            imported. For tests: it is slower than anything else.
    """

    name: ClassVar[str] = "triton"
    supports_key_bias: ClassVar[bool] = True

    def __init__(self, *, interpret: bool = False) -> None:
        self.interpret = interpret

    def unsupported_reasons(self, request: AttentionRequest) -> list[str]:
        """Name devices, dtypes, wide heads, many segments, masks, dropout and returned weights it cannot take."""
        reasons = reasons_against(request.queries.device, interpret=self.interpret)
        reasons += _reasons_against_numbers(request)
        count = sum(1 for segment in request.segments if segment.keys.shape[2])
        if count > MOST_SEGMENTS:
            reasons.append(f"{count} memory segments: the kernel takes {MOST_SEGMENTS} at most")
        mask = request.mask
        if mask is not None and without_mask(request) is None:
            reasons.append(
                f"mask {list(mask.shape)} {mask.dtype} for {request.queries.dtype} queries: the kernel knows causal "
                "text, windows and padding only, and this mask is neither"
            )
        if request.dropout:
            reasons.append(f"dropout={request.dropout}: the kernel keeps all weights")
        if request.need_weights:
            reasons.append("need_weights=True: the kernel never holds its weights")
        return reasons

    def attend(self, request: AttentionRequest) -> AttentionResult:
        """Compute the request. Queries that see nothing yield zeros."""
        from mplus.backends.triton.attention import attend

        plain = without_mask(request)
        return AttentionResult(attend(request if plain is None else plain))


def without_mask(request: AttentionRequest) -> AttentionRequest | None:
    """Return the request with ``padding`` in place of its mask, or None where the mask says something else.

    Queries at padding, which nobody reads, then see no text; what a mask lets them see does not matter.
    """
    mask = request.mask
    if mask is None:
        return request
    if request.padding is not None:
        return None
    # An additive mask must be 0 wherever it does not hide; the smallest finite number stands for "hidden".
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
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


def _reasons_against_numbers(request: AttentionRequest) -> list[str]:
    wanted = request.queries.dtype
    reasons = []
    if wanted not in DTYPES:
        reasons.append(f"queries are {wanted}: the kernel takes float16, bfloat16 and float32")
    reasons += mixed_dtypes(request, "the kernel")
    widths = request.queries.shape[3], request.values.shape[3]
    if max(widths) > WIDEST:
        reasons.append(f"heads of width {widths[0]} and {widths[1]}: the kernel takes {WIDEST} at most")
    return reasons
