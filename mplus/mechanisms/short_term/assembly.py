"""In which order rows stand in front of a text: ``[begin | retrieved | short-term]`` (M+ section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assemble(begin: Tensor | None, parts: Sequence[Tensor | None], like: Tensor, batch: tuple[int, ...] = ()) -> Tensor:
    """Return ``[*batch, P, d]``: the begin row and behind it all parts, in the device and dtype of ``like``.

    Args:
        begin: ``[1, d]``, the begin row of the layer; None: there is none in front of these rows.
        parts: ``[*batch, n_i, d]``, oldest first; None stands for no rows.
        like: gives device and dtype.
        batch: the dimensions in front of those of one stream.
    """
    rows = [part.to(like) for part in parts if part is not None]
    if begin is not None:
        rows.insert(0, begin.to(like).expand(*batch, -1, -1) if batch else begin.to(like))
    return rows[0] if len(rows) == 1 else torch.cat(rows, -2)
