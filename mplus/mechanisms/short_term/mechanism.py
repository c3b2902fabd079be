"""RowMechanism: what M+ and MemoryLLM share, short-term rows of which a random few leave for others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from attrs import define, evolve, field
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.config import MPlusConfig, one_of
from mplus.mechanisms.additions import MemoryAdditions
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import Decoder, DecoderShape, KeptProjection, Project, Text, side_by_side
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.mechanisms.root import Absorbed, Columns
from mplus.mechanisms.short_term.batched_streams import BatchedStreams, can_be_batched
from mplus.mechanisms.short_term.fresh import completed, empty_rows, first_state
from mplus.mechanisms.short_term.joint_prefix import JointPrepared
from mplus.mechanisms.short_term.merging import newest_in, with_newest, without_newest
from mplus.mechanisms.short_term.prefix_cache import Prepared
from mplus.mechanisms.short_term.state import ShortTermState, short_term_state, state_of
from mplus.mechanisms.short_term.tail import read_tails, read_tails_of_each
from mplus.mechanisms.short_term.write import (
    Drop,
    MadeFrom,
    MadeOf,
    WritePass,
    WritePlan,
    assemble,
    oldest_last,
    plan_write,
    split_order,
)
from mplus.mechanisms.streams import TrainingStreams
from mplus.memory.merging.incoming import Incoming
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import Update, WriteContext
from mplus.retrievers.base import RetrieverShape
from mplus.retrievers.build import build_retriever
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout

BEGIN_STD, MARK_STD = 0.5, 0.1
"""Of begin rows and mark of a decoder that is trained from nothing."""


class RowMechanism(MemoryMechanism):
    """Writes K rows of every layer, and reads ``[begin | retrieved | short-term]`` in front of the text.

    Attributes:
        batched: whether the streams of a training may be held as one tensor per layer; a class that derives from M+ and
            changes a rule leaves it False, and is then trained by its own methods.
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options that M+ and MemoryLLM share.

        Attributes:
            rows: what a row is: the "outputs" of its layer for one of the last K tokens of a chunk (M+ section 3.1),
                or what the layer receives for it, its "inputs". Keys and values made of inputs are those that the
                layer attends to when it reads the text itself: where K is the length of a chunk nothing is left to
                learn, and training can begin there.
            tokens: of which tokens of a chunk there are rows: the "last" K (M+ section 3.1), K at "even" distances, or
                the K most "unlikely" ones, by the decoder's own probabilities. With rows of "inputs" these are what a
                decoder can read without training: what it expects anyway it fills in itself.
            drop: which rows leave a full STM: "random" ones, so that what was told fades (MemoryLLM section 3.1.2), or
                the "oldest", so that whole chunks stay, and leave, together.
            begin: what the begin row of every layer starts as: the "embedding" of the token that begins a text
                (published), or the "inputs" that the layer receives for it, which carry its attention sink.
        """

        rows: MadeOf = field(default="outputs", validator=one_of("outputs", "inputs"))
        tokens: MadeFrom = field(default="last", validator=one_of("last", "even", "unlikely"))
        drop: Drop = field(default="random", validator=one_of("random", "oldest"))
        begin: Literal["embedding", "inputs"] = field(default="embedding", validator=one_of("embedding", "inputs"))

    State: ClassVar[type[ShortTermState]] = ShortTermState
    batched: ClassVar[bool] = False
    empty_is_base: ClassVar[bool] = False  # the begin row stands in front of every text
    additions: MemoryAdditions

    @classmethod
    def build(cls, shape: DecoderShape, config: MPlusConfig, options: Any) -> MemoryAdditions:
        """Make begin rows, the mark, and the retriever that ``config`` names, where there is long-term memory."""
        retriever = None
        if cls.uses_retriever and config.long_term_tokens != 0:
            retriever = build_retriever(config, RetrieverShape(layers=shape.layers, hidden_size=shape.width))
        return MemoryAdditions(shape.begin if options.begin == "embedding" else shape.begin_inputs, retriever)

    def start_from(self, pool: Tensor) -> None:
        self.additions.pool = pool

    def draw_parameters(self) -> None:
        nn.init.normal_(self.additions.begin, std=BEGIN_STD)
        nn.init.normal_(self.additions.mark, std=MARK_STD)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the begin rows, which training keeps in float32 whatever the decoder is in."""
        return self.additions.begin.dtype

    @property
    def long_term(self) -> bool:
        return self.uses_retriever and super().long_term

    @property
    def shortest_text(self) -> int:
        """Tokens of the shortest text that is written at once: as many as a chunk has rows, K, or ``min_chunk_tokens``.

        A shorter one would cost K rows, and have old rows written anew under its name. The variant "published" lets
        ``min_chunk_tokens`` wait only.
        """
        config = self.config
        if config.variant == "published":
            return config.min_chunk_tokens
        return max(config.min_chunk_tokens, min(config.memory_tokens_per_chunk, config.chunk_tokens))

    @property
    def waiting_rows(self) -> int:
        """The most rows that wait in a layer, between two merges, to get into long-term memory."""
        return 0

    def capacity(self, rows: int) -> int:
        """Return the tokens of so many rows of full chunks, each of which leaves K."""
        return rows * self.config.chunk_tokens // self.config.memory_tokens_per_chunk

    def reserve(self, layout: StoreLayout) -> int:
        """Return the bytes of a full STM, of all rows and text that can wait, and of hidden states kept for a write."""
        waiting = evolve(layout, expiry=False)
        short = waiting if not layout.keeps_hidden else evolve(waiting, key_size=0)  # keys are made when rows leave
        width = layout.hidden_size * layout.dtype.itemsize
        newest = 0 if layout.keeps_hidden else self.config.memory_tokens_per_chunk * width
        tail = -(-4 * self.config.chunk_tokens // layout.layers)  # ids, of all layers together
        return self.config.short_term_tokens * short.row_bytes + self.waiting_rows * waiting.row_bytes + newest + tail

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> ShortTermState:
        """Return a fresh stream: the checkpoint's pool if it has one, else empty."""
        state = self._first_state(layout)
        return state if columns is None else completed(state, layout, columns, self.config.memory_tokens_per_chunk)

    def holding(self, layout: StoreLayout, rows: Sequence[MemoryRows], hidden: Sequence[Tensor]) -> ShortTermState:
        """Return a new stream with the short-term ``rows`` of each layer, whose hidden states are ``[n, d]``."""
        k = self.config.memory_tokens_per_chunk
        newest = () if layout.keeps_hidden else tuple(part[max(len(part) - k, 0) :] for part in hidden)
        return evolve(self.new_state(layout), stm=tuple(rows), newest=newest)

    def _first_state(self, layout: StoreLayout) -> ShortTermState:
        """Return a fresh stream whose rows, if any, have hidden states only; a mechanism may keep more with it."""
        return first_state(layout, self.additions.pool)

    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        """Run one write pass over a chunk of every stream, which have equally many short-term rows."""
        # A state-space layer would read the rows standing in for old ones.
        reencode = not decoder.shape.hybrid and not text.short
        ids = text.need_ids()
        plans = [self.plan_write(state_of(view), ids.shape[1], reencode) for view in views]
        options = self.options
        write = WritePass(WritePlan.together(plans), self.additions, options.rows, options.tokens)
        return Update(write.run(decoder, ids))

    def example(self, decoder: Decoder, ids: Tensor, context: WriteContext) -> StreamView:
        """Return a stream whose short-term rows are those that a write of ``ids`` makes, and no others.

        A new stream can begin with a pool of thousands of rows, and MemoryLLM can fill its whole memory with the first
        chunk: every check would read them all.
        """
        layout = context.store.layout
        none = tuple(empty_rows(layout) for _ in range(layout.layers))
        empty = evolve(self.new_state(layout), stm=none, pending=none)
        made = self.write(decoder, [StreamView(empty, context.store)], Text(ids)).of(0).hidden
        births = torch.arange(len(made[0]), device=layout.device)
        stm = tuple(MemoryRows(rows.to(layout.device), births, torch.zeros_like(births)) for rows in made)
        return StreamView(evolve(empty, stm=stm, clock=len(births)), context.store.snapshot())

    def plan_write(self, state: ShortTermState, tokens: int, reencode: bool = True) -> WritePlan:
        """Rows read and made by writing a chunk of ``tokens`` text tokens (published: newest K rows of the STM).

        ``reencode`` False: a chunk shorter than K makes only as many rows as it has tokens.
        """
        layers = range(len(state.stm))
        newest = state.newest or tuple(rows.need_hidden() for rows in state.stm)
        count = min(*(hidden.shape[0] for hidden in newest), *(len(rows) for rows in state.stm))
        context = [newest[layer][newest[layer].shape[0] - count :] for layer in layers]
        return plan_write(context, tokens, self.config.memory_tokens_per_chunk, reencode=reencode)

    def absorb(self, state: StreamState, update: Update, source: int, context: WriteContext) -> Absorbed:
        state = short_term_state(state)
        k = update.hidden[0].shape[0]
        stm, dropped, newest, stayed = [], [], [], []
        permutation: Tensor | None = None
        for layer, (old, hidden) in enumerate(zip(state.stm, update.hidden, strict=True)):
            excess = max(len(old) + k - self.config.short_term_tokens, 0)
            permutation = self._drop_order(len(old), excess, permutation, context)
            stay, leave = _places(len(old), excess, permutation, old.birth.device)
            new = self._new_rows(layer, update, source, state, old, context)
            stm.append(MemoryRows.cat([old.select(stay), new]))  # a copy: the block is a view of all the pass computed
            dropped.append(old.select(leave))
            stayed.append(stay)
            if state.newest:
                own = torch.cat([state.newest_kept(layer, stay), hidden.to(state.newest[layer])])
                # max: of fewer rows all are kept; a negative start would count from the end.
                newest.append(own[max(own.shape[0] - self.config.memory_tokens_per_chunk, 0) :].clone())
        moved = evolve(state, stm=tuple(stm), newest=tuple(newest), clock=state.clock + k)
        moved, evicted = self.keep_dropped(moved, dropped, context)
        return Absorbed(moved, max(len(rows) for rows in dropped), evicted, {"stm": tuple(stayed)})

    def combine(self, state: StreamState, other: Incoming, context: WriteContext) -> Absorbed:
        """Take in all rows of another stream; of too many short-term ones some leave as the option ``drop`` says."""
        state = short_term_state(state)
        other.take_stored(state, context)
        theirs = with_newest(state_of(other.view))
        stm, dropped, permutation = list[MemoryRows](), list[MemoryRows](), None
        for rows in other.merged("stm", with_newest(state), theirs, state):
            excess = max(len(rows) - self.config.short_term_tokens, 0)
            permutation = self._drop_order(len(rows), excess, permutation, context)
            stay, leave = _places(len(rows), excess, permutation, rows.birth.device)
            stm.append(rows.select(stay))
            dropped.append(rows.select(leave))
        newest = newest_in(stm, self.config.memory_tokens_per_chunk) if state.newest else ()
        moved = evolve(state, stm=without_newest(stm), newest=newest, clock=other.order.clock)
        evicted, counts = 0, [len(rows) for rows in dropped]
        if any(counts):
            moved, evicted = self.keep_dropped(moved, without_newest(dropped), context)
        return Absorbed(moved, max(counts), evicted + max(context.evict()))

    def _drop_order(self, count: int, excess: int, before: Tensor | None, context: WriteContext) -> Tensor | None:
        """Return the order of ``count`` short-term rows of a layer, by which the last ``excess`` leave, if any do.

        ``before``: that of the layer before, which serves again where layers drop alike.
        """
        if not excess or (before is not None and not self.config.drop_per_layer and len(before) == count):
            return before
        return oldest_last(count, excess) if self.options.drop == "oldest" else context.draw(count)

    def _new_rows(
        self, layer: int, update: Update, source: int, state: ShortTermState, like: MemoryRows, context: WriteContext
    ) -> MemoryRows:
        """Return the new rows of a layer with the columns of its short-term rows ``like``."""
        hidden, device = update.hidden[layer], like.birth.device
        k = hidden.shape[0]
        rows = MemoryRows(
            hidden=None if like.hidden is None else hidden.to(like.hidden),
            birth=self._births(state, k).to(device),
            source=torch.full((k,), source, dtype=torch.int64, device=device),
        )
        if like.projected is not None:
            rows = rows.replace(projected=update.projected[layer].to(like.projected))
        if like.key is not None:
            key = context.keys(layer, hidden)
            rows = rows.replace(key=None if key is None else key.to(like.key))
        return rows

    def _births(self, state: ShortTermState, k: int) -> Tensor:
        return torch.arange(state.clock, state.clock + k, dtype=torch.int64)

    @abstractmethod
    def keep_dropped(
        self, state: ShortTermState, dropped: Sequence[MemoryRows], context: WriteContext
    ) -> tuple[ShortTermState, int]:
        """Where rows go that left the STM. Returns the new state and the rows evicted per layer."""

    def has_begin(self, view: StreamView) -> bool:
        """Return whether the begin row stands in front of all that is read."""
        return True

    def has_prefix(self, view: StreamView) -> bool:
        """Return whether a read puts anything in front of the text: the begin row, or text that waits."""
        return self.has_begin(view) or bool(view.state.tail)

    def prefix_rows(self, view: StreamView) -> int:
        """Rows a read puts in front of the text, in the layer that has most."""
        tail = view.state.tail_tokens
        if not self.has_begin(view):
            return tail
        rows = (1 + self.retrieved_rows(view, layer) + len(rows) for layer, rows in enumerate(state_of(view).stm))
        return max(rows) + tail

    def retrieved_rows(self, view: StreamView, layer: int) -> int:
        """Rows that ``retrieve`` brings back in one layer."""
        return 0

    def prepare(self, projection: KeptProjection, batch: int | None) -> Prepared:
        return Prepared(projection, self.additions.begin, batch)

    def prepare_together(self, prepared: Sequence[Prepared]) -> Prepared:
        first = prepared[0]
        return JointPrepared(first.projection, first.begin, own=prepared)

    def prepare_tensors(self) -> dict[str, Tensor]:
        return {"begin": self.additions.begin}

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Read what waits, if anything does, in a pass of its own, which reads of the same state share."""
        if not any(view.state.tail for view in views):
            return Opened(views)
        if text.shared_by_row:
            tail = read_tails_of_each(self, decoder, views, [table() for table in text.shared_by_row])
        else:
            tail = read_tails(self, decoder, views, text.shared())
        learned = decoder.shape.positions == "learned"  # those of the text go on behind those of the tail
        return Opened(views, own=tail, text_offset=torch.tensor(tail.counts) if learned else None)

    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...]:
        """Return ``[begin | retrieved | short-term]`` of every stream (M+ section 3.3), and behind it what waits."""
        views, tail = opened.views, opened.own
        begins = [self.has_begin(view) for view in views]
        if opened.prepared is not None:
            with torch.no_grad():
                prepared: Prepared = opened.prepared
                if tail is None:
                    return prepared.segments(layer, views, found, begins, hidden)
                return (
                    *prepared.segments(layer, views, found, begins, hidden, tail.counts),
                    project(tail.together(layer)),
                )
        streams = []
        for place, (view, retrieved) in enumerate(zip(views, found, strict=True)):
            begin = self.additions.begin[layer] if begins[place] else None
            long_term = None if retrieved is None else retrieved.rows.need_hidden()
            short_term = state_of(view).stm[layer].need_hidden()
            waiting = None if tail is None else tail.of(place, layer)
            streams.append(assemble(begin, [long_term, short_term, waiting], hidden))
        rows = side_by_side(streams)
        return (project(rows if tail is None else tail.placed(rows, [len(one) for one in streams])),)

    def streams(
        self,
        decoder: Decoder,
        layout: StoreLayout,
        numbers: Sequence[int],
        *,
        seed: int,
        long_term: bool = True,
    ) -> TrainingStreams | None:
        """Return streams that are held as one tensor per layer, where these follow the configuration."""
        config = self.config
        long_term = long_term and config.long_term_tokens != 0 and self.uses_retriever
        # Of the class itself, not inherited: a class that derives from M+ may have changed any rule.
        known = vars(type(self)).get("batched", False) and self.additions.pool is None
        if not known or not can_be_batched(config, long_term=long_term):
            return None
        capacity = config.long_term_tokens or 0 if long_term else 0
        return BatchedStreams(config, self.additions, decoder, layout, numbers, seed=seed, long_term_tokens=capacity)

    def standing(self, view: StreamView, layer: int) -> MemoryRows:
        """Return the short-term rows of a layer."""
        return state_of(view).stm[layer]


def _places(count: int, excess: int, permutation: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions that stay and the ``excess`` that leave, both ascending, on ``device``."""
    if not excess or permutation is None:
        return torch.arange(count, device=device), torch.arange(0, device=device)
    stay, leave = split_order(permutation, excess)
    return stay.to(device), leave.to(device)
