"""Recall by cross-attention between a topic summary and the list of memory vectors; its loss, where it is taught."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor
from torch.nn import functional

from mplus.errors import InputError, MechanismError
from mplus_hmt.additions import HMTAdditions

FLAT_FROM = 4096
"""Width from which the released code divides scores by h in training, where it divides by sqrt(h) in generation."""


@define(frozen=True, eq=False)
class Recalled:
    """The prompt that a segment is read behind, and what it was made of.

    Attributes:
        prompt: ``[B, 1, w]``, P; P0 in rows whose list is empty.
        summary: ``[B, 1, w]``, S; None where nothing was summarised, because all lists are empty or there is no recall.
        scores: ``[B, 1, m]``, a, with zeros behind the end of shorter lists; None likewise.
    """

    prompt: Tensor
    summary: Tensor | None = None
    scores: Tensor | None = None


def side_by_side_lists(lists: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return lists ``[m_i, w]`` as ``[B, m, w]`` with zeros behind shorter ones, and their lengths ``[B]`` int64."""
    longest = max(len(one) for one in lists)
    padded = [functional.pad(one, (0, 0, 0, longest - len(one))) for one in lists]
    return torch.stack(padded), torch.tensor([len(one) for one in lists], device=padded[0].device)


def recall(
    parts: HMTAdditions,
    summary: Tensor,
    memory: Tensor,
    lengths: Tensor,
    *,
    dtype: torch.dtype | None = None,
    flat: bool = False,
) -> Recalled:
    """Recall from lists of memory vectors: the values are these vectors themselves.

    Args:
        parts: has Wq, Wk and P0.
        summary: ``[B, 1, w]``, S.
        memory: ``[B, m, w]``, M; anything behind the ends of shorter lists.
        lengths: ``[B]`` int64, the lengths of the lists; P0 is recalled from an empty one.
        dtype: of weights, scores and sum (the released code: bfloat16); None: that of the summary.
        flat: divide by h in the place of sqrt(h) where h and w are at least 4096 (released: in training).

    Raises:
        MechanismError: these parameters were made without recall.
    """
    if parts.query is None or parts.key is None:
        raise MechanismError("recall needs Wq and Wk, and this memory was made with recall=false: it has none")
    width = parts.query.weight.shape[0]
    scale = width if flat and min(parts.query.weight.shape) >= FLAT_FROM else math.sqrt(width)
    kind = summary.dtype if dtype is None else dtype
    asked = functional.linear(summary.to(kind), parts.query.weight.to(kind))
    found = functional.linear(memory.to(kind), parts.key.weight.to(kind))
    beyond = torch.arange(memory.shape[1], device=lengths.device) >= lengths[:, None, None]
    empty = (lengths == 0)[:, None, None]
    scores = (asked @ found.mT / scale).masked_fill(beyond & ~empty, -math.inf).softmax(-1)
    prompt = (scores @ memory.to(kind)).to(summary.dtype)
    return Recalled(torch.where(empty, parts.first_prompts(summary), prompt), summary, scores.masked_fill(empty, 0.0))


def retrieval_loss(scores: Tensor, positives: Tensor, *, twice: bool = False) -> Tensor:
    """Return the cross-entropy, a scalar, of recall with the memory vectors that should have been recalled.

    Rows without any are left out; 0 where there are no others.

    Args:
        scores: ``[B, m]``, the softmax a of a recall.
        positives: ``[B, m]``, at least 0: how much each vector should be recalled; scaled to a sum of 1.
        twice: take the softmax of the scores once more, as the released code does.

    Raises:
        InputError: the two differ in shape.
    """
    if scores.shape != positives.shape:
        raise InputError(
            f"positives must be {list(scores.shape)}, one for every vector of the lists, got {list(positives.shape)}"
        )
    known = positives.sum(-1) > 0
    if not bool(known.any()):
        return scores.sum() * 0.0
    wanted = positives[known] / positives[known].sum(-1, keepdim=True)
    logs = scores[known].log_softmax(-1) if twice else scores[known].clamp(min=torch.finfo(scores.dtype).tiny).log()
    return -(wanted * logs).sum(-1).mean()
