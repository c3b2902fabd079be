"""Reading many texts from many streams in one pass, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from mplus.backends.base import Segment
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.mechanisms.decoder import Adapter, Project, Rows
from mplus.training.batched.selection import Picker
from mplus.training.batched.stream_batch import StreamBatch

Candidates = Callable[[int, Tensor], Tensor]
"""``candidates(layer, sources [B, n + m])`` -> ``[B, c]``: places of the rows, short-term before long-term, that a
retriever loss wants to score."""


@define(eq=False)
class LayerRead:
    """What one layer read.

    Attributes:
        text: ``[B, R, T, d]``, the texts after the layer's input norm, with their graph.
        picked: ``[B, R, k]`` int64, places in the long-term rows, oldest first; None where nothing was retrieved.
        picked_source: ``[B, R, k]`` int64, what those rows were written from.
        scores: ``[B, R, k]``, the picker's scores.
        place: ``[B, c]`` int64, the places that a retriever loss asked for; None where it did not.
        candidates: ``[B, c, d]`` the rows there, after the input norm.
        candidate_source: ``[B, c]`` int64.
        newest: ``[B, K, d]`` the newest short-term rows after the input norm, for a retriever loss.
        newest_source: ``[B, K]`` int64.
    """

    text: Tensor
    picked: Tensor | None = None
    picked_source: Tensor | None = None
    scores: Tensor | None = None
    place: Tensor | None = None
    candidates: Tensor | None = None
    candidate_source: Tensor | None = None
    newest: Tensor | None = None
    newest_source: Tensor | None = None


@define(frozen=True, eq=False)
class Read:
    """``logits`` ``[B, R, T, V]`` and what each layer that carries memory read."""

    logits: Tensor
    layers: dict[int, LayerRead]


class DenseDecoder:
    """A wrapped decoder, seen from streams.

    Attributes:
        model: the wrapped decoder.
        engine: its engine.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.engine: DecoderEngine = model.mplus_engine

    def read(
        self,
        streams: StreamBatch,
        texts: Tensor,
        *,
        queries: Tensor | None = None,
        picker: Picker | None = None,
        candidates: Candidates | None = None,
        retrieved_tokens: int | None = None,
    ) -> Read:
        """Read R texts of each stream: ``[begin | picked long-term rows | STM | text]`` (M+ section 3.3).

        Args:
            streams: what is read; not changed.
            texts: ``[B, R, T]`` int64, padding on the right.
            queries: ``[B, R, T]`` bool, the tokens that the picker sees; None: all.
            picker: chooses long-term rows; None: none are read.
            candidates: rows wanted for a retriever loss.
            retrieved_tokens: K0 for this read; None: that of the config.
        """
        k0 = self.engine.config.retrieved_tokens if retrieved_tokens is None else retrieved_tokens
        rows = 1 + streams.rows + max(min(k0 if picker else 0, ltm.count) for ltm in streams.ltm)
        queries = torch.ones_like(texts, dtype=torch.bool) if queries is None else queries
        source = StreamSource(self.engine, streams, queries, picker, candidates, k0)
        return self._run(source, texts, rows, "read", source.layers)

    def read_rows(self, rows: Sequence[Tensor], texts: Tensor, adapter: Adapter) -> Read:
        """Read texts ``[B, R, T]`` with the rows of one write only (per layer ``[B, k, d]``), keeping their graph.

        ``adapter`` is "write" or "read" (published: "write").
        """
        source = RowSource(self.engine, rows)
        return self._run(source, texts, 1 + rows[0].shape[1], adapter, {})

    def plain(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, V]`` of the decoder alone, without memory and adapters; ``mask`` ``[B, S]`` for padding."""
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if mask is not None and not bool(mask.all()):
            inputs.update(attention_mask=mask.long(), **self.engine.padded_positions(mask))
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def _run(self, source: Any, texts: Tensor, rows: int, adapter: Adapter, layers: dict[int, LayerRead]) -> Read:
        batch, each, tokens = texts.shape
        ids = texts.reshape(batch * each, tokens)
        found = self.engine.decoder.run(
            ids, prefix=source.prefix, prefix_rows=rows, adapter=adapter, collect=("logits",)
        )
        logits: Any = found.logits
        return Read(logits.view(batch, each, tokens, -1), layers)


@define(eq=False)
class StreamSource:
    """Gives every layer ``[begin | picked | STM]`` of the stream that a text belongs to.

    A recomputation in backward (gradient checkpointing) finds in ``layers`` what the first pass chose.
    """

    engine: DecoderEngine
    streams: StreamBatch
    queries: Tensor
    picker: Picker | None
    wanted: Candidates | None
    k0: int
    layers: dict[int, LayerRead] = field(factory=dict)

    def prefix(self, layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        """See ``mplus.mechanisms.decoder.Prefix``."""
        spec, streams = self.engine.retrofit.anatomy.specs[layer], self.streams
        batch, each = self.queries.shape[:2]
        # A recomputation repeats every step that is recorded for backward, but not the choices.
        seen = self._look(spec, hidden.view(batch, each, *hidden.shape[1:]), self.layers.get(layer))
        self.layers.setdefault(layer, seen)
        begin = self.engine.mechanism.additions.begin[layer].to(hidden)
        parts = [begin.expand(batch * each, -1, -1)]
        if seen.picked is not None:
            ltm = streams.ltm[layer].hidden
            index = seen.picked.flatten(1)[..., None].expand(-1, -1, ltm.shape[2])
            parts.append(ltm.gather(1, index).view(batch * each, -1, ltm.shape[2]).to(hidden))
        stm = streams.stm[layer].to(hidden)
        if self.engine.retrofit.positions.layout != "sequential" or not stm.shape[1]:
            return (project(Rows(torch.cat([*parts, stm.repeat_interleave(each, 0)], 1))),)
        # The texts of a stream share its STM, so that is projected once.
        front = project(Rows(torch.cat(parts, 1), behind=stm.shape[1]))
        back = project(Rows(stm))
        keys = torch.cat([front.keys, back.keys.repeat_interleave(each, 0)], 2)
        values = torch.cat([front.values, back.values.repeat_interleave(each, 0)], 2)
        return (Segment(keys, values),)

    def _look(self, spec: AttentionSpec, text: Tensor, before: LayerRead | None) -> LayerRead:
        """What this layer picks and offers to a retriever loss; ``before``: what it did the first time."""
        layer, streams = spec.memory_index, self.streams
        ltm, read = streams.ltm[layer], LayerRead(text)
        if before is not None:
            read.picked, read.place = before.picked, before.place
        elif self.picker is not None and min(self.k0, ltm.count):
            self._pick(spec, text, read)
        if self.wanted is not None:
            sources = torch.cat([streams.stm_source[layer], ltm.source], 1)
            read.place = self.wanted(layer, sources) if read.place is None else read.place
            rows = torch.cat([streams.stm[layer], ltm.hidden], 1)
            rows = rows.gather(1, read.place[..., None].expand(-1, -1, rows.shape[2])).to(text)
            read.candidates = rows if spec.norm is None else spec.norm(rows)
            read.candidate_source = sources.gather(1, read.place)
            new = slice(max(streams.rows - self.engine.config.memory_tokens_per_chunk, 0), None)
            newest = streams.stm[layer][:, new].to(text)
            read.newest = newest if spec.norm is None else spec.norm(newest)
            read.newest_source = streams.stm_source[layer][:, new]
        return read

    @torch.no_grad()
    def _pick(self, spec: AttentionSpec, text: Tensor, read: LayerRead) -> None:
        assert self.picker is not None  # noqa: S101  (the caller checked)
        ltm = self.streams.ltm[spec.memory_index]
        rows = ltm.hidden if spec.norm is None else spec.norm(ltm.hidden)
        count = min(self.k0, ltm.count)
        best, scores = self.picker.pick(spec.memory_index, text.detach(), self.queries, rows, ltm, count)
        births = ltm.birth[:, None].expand(-1, best.shape[1], -1).gather(2, best)
        order = births.argsort(dim=2)
        read.picked, read.scores = best.gather(2, order), scores.gather(2, order)
        read.picked_source = ltm.source[:, None].expand(-1, best.shape[1], -1).gather(2, read.picked)


@define(eq=False)
class RowSource:
    """Gives every layer ``[begin | rows]``."""

    engine: DecoderEngine
    rows: Sequence[Tensor]

    def prefix(self, layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        """See ``mplus.mechanisms.decoder.Prefix``."""
        rows = self.rows[layer].to(hidden)
        each = hidden.shape[0] // rows.shape[0]
        begin = self.engine.mechanism.additions.begin[layer].to(hidden).expand(hidden.shape[0], -1, -1)
        return (project(Rows(torch.cat([begin, rows.repeat_interleave(each, 0)], 1))),)
