"""The tokens of a text that retrieve."""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor


def without_padding(ids: Tensor, padding_id: int | None = None) -> Tensor:
    """Return ``[B, T]`` bool, False at what looks like right padding in ``ids`` ``[B, T]`` that came without a mask.

    That is a run of one id at the end of a row, of two tokens or more, or of one that is ``padding_id``. A row that is
    one run altogether keeps all of its tokens.
    """
    tokens = ids.shape[1]
    last = ids[:, -1:]
    run = (ids == last).flip(1).cumprod(1).flip(1).bool()
    length = run.sum(1, keepdim=True)
    padding = length >= 2
    if padding_id is not None:
        padding = padding | (last == padding_id)
    return ~(run & padding & (length < tokens))


def first_tokens(mask: Tensor, count: int | tuple[int, ...] | None) -> Tensor:
    """Return ``mask`` ``[B, T]`` bool with the first ``count`` of its tokens only; one number, or one per row."""
    if count is None:
        return mask
    most = torch.tensor(count, device=mask.device)
    return mask & (mask.cumsum(1) <= (most[:, None] if most.dim() else most))


@define(frozen=True, eq=False)
class Recent:
    """Text of one layer since its last retrieval.

    Attributes:
        hidden: ``[B, W, d]``, attention inputs.
        waiting: ``[B, W]`` bool on the CPU, True at the tokens that retrieve when enough have come.
    """

    hidden: Tensor
    waiting: Tensor


@define(frozen=True, eq=False)
class Window:
    """The rows of a batch that retrieve anew in one forward, and their tokens: the same in all layers.

    Attributes:
        rows: those that retrieve.
        queries: ``[len(rows), W + n]`` bool, their tokens among the W recent ones and the first n of the forward.
        begin: how many of the recent and new tokens no row waits with any more.
        waiting: ``[B, W']`` bool, ``Recent.waiting`` of the rest.
    """

    rows: list[int]
    queries: Tensor
    begin: int
    waiting: Tensor

    @staticmethod
    def of(waiting: Tensor | None, text: Tensor, first: int, every: int) -> Window:
        """Find the window of a forward.

        Args:
            waiting: ``Recent.waiting`` so far; None: nothing.
            text: ``[B, T]`` bool on the CPU, the new tokens that count.
            first: so many of the new columns take part in the retrieval.
            every: tokens after which a row retrieves.
        """
        before = text[:, :0] if waiting is None else waiting
        seen = torch.cat([before, text[:, :first]], 1)
        due = seen.sum(1) >= every
        left = torch.cat([seen & ~due[:, None], text[:, first:]], 1)
        begin = int((left.any(0).cumsum(0) == 0).sum())
        return Window(due.nonzero().squeeze(1).tolist(), seen[due], begin, left[:, begin:])
