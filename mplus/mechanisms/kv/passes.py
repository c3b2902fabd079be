"""Passes over ids behind the rows of a memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.mechanisms.decoder import Collected, Decoder, PassResult
from mplus.mechanisms.kv.front import Front
from mplus.memory.state import StreamView


def run_behind(
    decoder: Decoder, front: Front, ids: Tensor, *, collect: Collection[Collected], mask: Tensor | None = None
) -> PassResult:
    """Run one pass over ``ids`` ``[B, n]``, as a chunk is written, behind the rows of ``front``.

    Args:
        decoder: runs it.
        front: rows in front of each text.
        ids: int64, padded on the right, if at all.
        collect: what is wanted of the pass.
        mask: ``[B, n]`` bool, False at padding; None: there is none.
    """
    ids = ids.to(decoder.shape.device)
    return decoder.run(
        ids,
        prefix=lambda layer, hidden, project: front.segments(layer, hidden),
        insertion=front.insertion,
        adapter="write",
        mask=None if mask is None else mask.to(ids.device),
        collect=collect,
    )


@define(frozen=True, eq=False)
class BegunDecoder:
    """Reads texts behind what every chunk is written behind: a ``mplus.retrievers.chunks.ChunkDecoder``.

    Attributes:
        decoder: runs the passes.
        views: a stream for each text; or one for all texts.
        begins: of each stream ``[L, b, w]``, the rows of its begin.
    """

    decoder: Decoder
    views: Sequence[StreamView]
    begins: Sequence[Tensor]

    @torch.no_grad()
    def hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        copies = ids.shape[0] // len(self.views)
        views, begins = list(self.views) * copies, list(self.begins) * copies
        front = Front.before_text(self.decoder.kept, views, [torch.empty(0, dtype=torch.int64)] * len(views), begins)
        return run_behind(self.decoder, front, ids, mask=mask, collect={"hidden"}).hidden_states
