"""BatchedPrefix: what every layer sees in front of the texts that read batched streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from attrs import define, field
from torch import Tensor

from mplus.backends.base import Segment
from mplus.config import MPlusConfig
from mplus.mechanisms.decoder import Decoder, Project, Rows
from mplus.mechanisms.short_term.long_term_rows import LongTermRows
from mplus.mechanisms.short_term.write import assemble
from mplus.mechanisms.streams import Candidates, LayerRead
from mplus.retrievers.base import Retriever


class BatchedRows(Protocol):
    """The rows of B streams; see ``mplus.mechanisms.short_term.batched_streams``."""

    @property
    def rows(self) -> int:
        """Short-term rows of each layer and stream, n."""

    @property
    def stm(self) -> Sequence[Tensor]:
        """Per layer ``[B, n, d]``, oldest first."""

    @property
    def stm_source(self) -> Sequence[Tensor]:
        """Per layer ``[B, n]`` int64."""

    @property
    def ltm(self) -> Sequence[LongTermRows]:
        """Per layer, the rows that left the STM."""


@define(eq=False)
class BatchedPrefix:
    """Gives every layer ``[begin | selected | STM]`` of the stream that a text belongs to.

    A recomputation in backward (gradient checkpointing) finds in ``layers`` what the first pass chose.

    Attributes:
        streams: what is read; not changed.
        config: of the mechanism.
        begin: ``[L, 1, d]``, the begin rows.
        decoder: norms rows as their layer does.
        queries: ``[B, R, T]`` bool, the tokens that the selector sees.
        selector: chooses long-term rows; None: none are read.
        wanted: chooses rows for a retriever loss; None: there is none.
        k0: long-term rows to choose, at most.
        layers: what each layer read.
    """

    streams: BatchedRows
    config: MPlusConfig
    begin: Tensor
    decoder: Decoder
    queries: Tensor
    selector: RowSelector | None
    wanted: Candidates | None
    k0: int
    layers: dict[int, LayerRead] = field(factory=dict)

    def prefix(self, layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        """Return what a layer sees in front of its texts: a ``mplus.mechanisms.decoder.Prefix``."""
        streams = self.streams
        batch, each = self.queries.shape[:2]
        # A recomputation repeats every step that is recorded for backward, but not the choices.
        seen = self._look(layer, hidden.view(batch, each, *hidden.shape[1:]), self.layers.get(layer))
        self.layers.setdefault(layer, seen)
        retrieved = None
        if seen.selected is not None:
            ltm = streams.ltm[layer].hidden
            index = seen.selected.flatten(1)[..., None].expand(-1, -1, ltm.shape[2])
            retrieved = ltm.gather(1, index).view(batch * each, -1, ltm.shape[2])
        stm = streams.stm[layer]
        # The texts of a stream share its STM, so that is projected once.
        rows = assemble(self.begin[layer], [retrieved], hidden, batch=hidden.shape[:1])
        front = project(Rows(rows, behind=stm.shape[1]))
        if not stm.shape[1]:
            return (front,)
        back = project(Rows(stm.to(hidden), before=front.keys.shape[2]))
        keys = torch.cat([front.keys, back.keys.repeat_interleave(each, 0)], 2)
        values = torch.cat([front.values, back.values.repeat_interleave(each, 0)], 2)
        return (Segment(keys, values),)

    def _look(self, layer: int, text: Tensor, before: LayerRead | None) -> LayerRead:
        """Return what this layer selects and offers to a retriever loss; ``before``: what it did the first time."""
        streams = self.streams
        ltm, read = streams.ltm[layer], LayerRead(text)
        if before is not None:
            read.selected, read.candidate_index = before.selected, before.candidate_index
        elif self.selector is not None and min(self.k0, ltm.count):
            self._select(layer, text, read, self.selector)
        if self.wanted is not None:
            self._offer(layer, text, read, self.wanted)
        return read

    def _offer(self, layer: int, text: Tensor, read: LayerRead, wanted: Candidates) -> None:
        streams, ltm, normed = self.streams, self.streams.ltm[layer], self.decoder.normed
        sources = torch.cat([streams.stm_source[layer], ltm.source], 1)
        if read.candidate_index is None:
            read.candidate_index = wanted(layer, sources)
        rows = torch.cat([streams.stm[layer], ltm.hidden], 1)
        rows = rows.gather(1, read.candidate_index[..., None].expand(-1, -1, rows.shape[2]))
        read.candidates = normed(layer, rows.to(text))
        read.candidate_source = sources.gather(1, read.candidate_index)
        new = slice(max(streams.rows - self.config.memory_tokens_per_chunk, 0), None)
        read.recent = normed(layer, streams.stm[layer][:, new].to(text))
        read.recent_source = streams.stm_source[layer][:, new]

    @torch.no_grad()
    def _select(self, layer: int, text: Tensor, read: LayerRead, selector: RowSelector) -> None:
        ltm = self.streams.ltm[layer]
        rows, count = self.decoder.normed(layer, ltm.hidden), min(self.k0, ltm.count)
        best, scores = selector.select(layer, text.detach(), self.queries, rows, ltm, count)
        births = ltm.birth[:, None].expand(-1, best.shape[1], -1).gather(2, best)
        order = births.argsort(dim=2)
        read.selected, read.scores = best.gather(2, order), scores.gather(2, order)
        # A copy: buffers of long-term rows are written in place.
        read.searched_source = ltm.source.clone()
        read.selected_source = read.searched_source[:, None].expand(-1, best.shape[1], -1).gather(2, read.selected)


class RowSelector(Protocol):
    """Chooses long-term rows for every text of every stream."""

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return places ``[B, R, count]`` int64 in the long-term rows, in any order, and their scores.

        Args:
            layer: index among the layers that carry memory.
            text: ``[B, R, T, d]`` after the layer's input norm.
            queries: ``[B, R, T]`` bool, the tokens to choose by.
            rows: ``[B, m, d]`` long-term rows after the input norm.
            ltm: the same rows with source and birth.
            count: how many, at most m.
        """


@define(frozen=True, eq=False)
class ScoreSelector:
    """Chooses the rows that a retriever scores best, with keys made anew by its present weights."""

    retriever: Retriever

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        best = self.score(layer, text, queries, rows).topk(count, dim=2)
        return best.indices, best.values

    def score(self, layer: int, text: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        """Return ``[B, R, m]``, the score of every row for every text."""
        batch, each, tokens, size = text.shape
        keys = self.retriever.project_keys(layer, rows.flatten(0, 1)).view(*rows.shape[:2], -1)  # type: ignore[union-attr]
        projected = self.retriever.project_queries(layer, text.reshape(batch * each, tokens, size))
        return self.retriever.score(layer, projected.view(batch, each, tokens, -1), queries, keys)
