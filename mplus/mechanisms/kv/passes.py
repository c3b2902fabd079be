"""Passes over ids behind the rows of a memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mplus.mechanisms.decoder import Collected, Decoder, KeptProjection, PassResult
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


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, n]`` of texts, padded on the right, and a bool mask ``[B, n]`` that is False there."""
    lengths = torch.tensor([len(text) for text in texts])
    return pad_sequence(list(texts), batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


@define(eq=False)
class BegunDecoder:
    """Reads texts behind what every chunk is written behind: a ``mplus.retrievers.chunks.ChunkDecoder``.

    Attributes:
        decoder: runs the passes.
        views: a stream for each text; or one for all texts.
        begins: of each stream ``[L, b, w]``, the rows of its begin.
        keeps_values: ``values`` may be asked for.
    """

    decoder: Decoder
    views: Sequence[StreamView]
    begins: Sequence[Tensor]
    keeps_values: bool = False
    _last: tuple[Tensor, PassResult] | None = field(default=None, init=False)

    @property
    def weights(self) -> str:
        return self.decoder.weights

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        return self._read(ids, mask).hidden_states

    def values(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        """Return the values ``[B, n, Hkv, Dv]`` of each layer; of the texts that were read last, without a pass."""
        return [values_in(self.decoder.kept, rows) for rows in self._read(ids, mask).projected]

    @torch.no_grad()
    def _read(self, ids: Tensor, mask: Tensor) -> PassResult:
        if self._last is not None and self._last[0] is ids:
            return self._last[1]
        copies = ids.shape[0] // len(self.views)
        views, begins = list(self.views) * copies, list(self.begins) * copies
        front = Front.before_text(self.decoder.kept, views, [torch.empty(0, dtype=torch.int64)] * len(views), begins)
        found = run_behind(
            self.decoder, front, ids, mask=mask, collect={"hidden", "projected"} if self.keeps_values else {"hidden"}
        )
        self._last = (ids, found)
        return found


def values_in(kept: KeptProjection, rows: Tensor) -> Tensor:
    """Return the values ``[..., Hkv, Dv]`` in rows ``[..., w]`` of keys and values."""
    values: Tensor = rows[..., kept.heads * kept.width :].unflatten(-1, (kept.heads, kept.value_width))
    return values
