"""KvMechanism: keys and values of the text's own tokens, brought back by whole chunks in front of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.config import Component, JsonValue, MPlusConfig, any_number, flag, must_be, one_of, whole
from mplus.errors import ConfigError, InputError
from mplus.mechanisms.base import Kept
from mplus.mechanisms.decoder import Decoder, Text
from mplus.mechanisms.kv.calibration import found_by
from mplus.mechanisms.kv.chat import ChatFormat
from mplus.mechanisms.kv.chunks import cut_at_sentences
from mplus.mechanisms.kv.front import Front
from mplus.mechanisms.kv.passes import run_behind
from mplus.mechanisms.kv.reads import KvReads
from mplus.mechanisms.kv.settle import check_limited, settled
from mplus.mechanisms.kv.state import KvState, kv_state, merged_table, state_of
from mplus.mechanisms.root import Absorbed, Columns
from mplus.memory.merging.incoming import Incoming
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import Update, WriteContext
from mplus.registry import Registry
from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.retrievers.chunks.base import ChunkRetriever
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.tokenizer import Tokenizer


def _ids(value: Sequence[int] | None) -> tuple[int, ...] | None:
    """Make a tuple of a list; leave all else to the validator."""
    return tuple(value) if isinstance(value, list) else value  # type: ignore[return-value]  # checked by ``token_ids``


token_ids = must_be(
    "a list of token ids, or None",
    lambda value: value is None or (isinstance(value, tuple) and all(type(one) is int and one >= 0 for one in value)),
)
"""Validator: ids of tokens, or None."""


class KvMechanism(KvReads):
    """Keeps un-rotated keys and values of every token written, and reads ``[begin | retrieved chunks | text]``.

    A row is a token. A read brings back whole chunks, the same in all layers, chosen once by its first forward; a
    memory without chunks puts nothing in front of the text. Nothing is trained.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism="kv", chunk_tokens=128, retrieved_tokens=1024)
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the memory of keys and values.

        Attributes:
            context_chunks: chunks of the same source, the newest ones, that a chunk is read behind when it is written;
                0: none; None: all there are. Its rows hold nothing of other sources in any case.
            begin: ids of the tokens that every chunk is written behind; None: the default prefix of the tokenizer's
                chat template, up to and including the opening of the user's turn, at the first write; where there is
                no tokenizer or template, the decoder's BOS, else EOS, if it has one.
            opening, closing: ids in front of and behind the content of a user's turn; None: by the same template.
            order: of the chunks that are brought back: by "score", the best one next to the text, or as "written".
            retrieved_chunks: brought back at most; None: as many as ``retrieved_tokens`` has room for.
            min_score: a chunk whose score is not above it is not brought back; 0: all may be; None: as
                ``MPlusConfig.min_score`` says, else the threshold of the retriever.
            rerank: so many of the best are reordered by how well their tokens match those of the question (late
                interaction), which takes no pass; 0: none.
            likelihood: and by how likely the decoder finds the question behind each of them, in one batched pass.
        """

        context_chunks: int | None = field(default=0, validator=whole(0, optional=True))
        begin: tuple[int, ...] | None = field(default=None, converter=_ids, validator=token_ids)
        opening: tuple[int, ...] | None = field(default=None, converter=_ids, validator=token_ids)
        closing: tuple[int, ...] | None = field(default=None, converter=_ids, validator=token_ids)
        order: str = field(default="score", validator=one_of("written", "score"))
        retrieved_chunks: int | None = field(default=1, validator=whole(1, optional=True))
        min_score: float | None = field(default=None, validator=any_number)
        rerank: int = field(default=6, validator=whole(0))
        likelihood: bool = field(default=False, validator=flag)

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Return nothing: there is one variant."""
            return {}

    name = "kv"
    State: ClassVar[type[StreamState]] = KvState
    keeps: ClassVar[frozenset[Kept]] = frozenset({"projected"})
    keeps_states: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, int]] = {"chunk_tokens": 128, "retrieved_tokens": 1024}
    retrievers: ClassVar[Registry[ChunkRetriever]] = CHUNK_RETRIEVERS
    default_retriever: ClassVar[Component] = Component("hybrid")

    @classmethod
    def settle(cls, config: MPlusConfig, room: int | None) -> MPlusConfig:
        return settled(config, room, cls.sizes, cls.default_retriever)

    @property
    def isolated_sources(self) -> bool:
        return True

    def reserve(self, layout: StoreLayout) -> int:
        """Return the bytes of the begin, of one token where the options do not say it; what it takes more is counted.

        See ``_is_over``. Raises ConfigError where chunks must not leave.
        """
        check_limited("bytes_budget", self.options.context_chunks)
        begin = 1 if self.options.begin is None else len(self.options.begin)
        return begin * layout.projected_size * layout.dtype.itemsize

    def bytes_beside(self, rows: int) -> int:
        """Return the bytes of the chunk table of so many tokens: 4 for each, and 24 for a chunk, which is one at least.

        What more it takes is counted when chunks leave.
        """
        return 4 * rows + 24 * rows

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> KvState:
        if layout.expiry:
            raise ConfigError(
                f"eviction must be a policy by which rows leave at capacity with the mechanism {self.name!r}, which "
                "merges nothing, so that no lifetime would run out: use 'fifo', say"
            )
        return KvState.empty(layout)

    def with_tokenizer(self, state: StreamState, tokenizer: Tokenizer | None) -> KvState:
        """Note how texts begin: by the options, else by the chat template, in a stream that does not know it yet.

        The chunks that there are stay what they were written behind.
        """
        found, options = cast("KvState", state), self.options
        if len(found.opening_ids):
            return found
        chat = ChatFormat.of(tokenizer) or ChatFormat((), (), ())
        known = {
            "begin_ids": () if found.tokens else chat.prefix if options.begin is None else options.begin,
            "opening_ids": chat.opening if options.opening is None else options.opening,
            "closing_ids": chat.closing if options.closing is None else options.closing,
        }
        news: dict[str, Any] = {
            name: torch.tensor(ids, dtype=torch.int32)
            for name, ids in known.items()
            if ids and not len(getattr(found, name))
        }
        return evolve(found, **news) if news else found

    def calibrate(self, decoder: Decoder, view: StreamView, tokenizer: Tokenizer | None) -> None:
        """Find out in which layers the decoder tells texts apart; say what is lost where there is no tokenizer."""
        if tokenizer is None:
            self.calibrations.warn_without_tokenizer()
            return
        state = self.with_tokenizer(view.state, tokenizer)
        first = self._begin_ids(state, decoder.shape.first_token)
        self.calibrations.of(decoder, view, first, lambda: self._begins(decoder, [state])[0], tokenizer)

    def chunks(self, ids: Tensor, tokenizer: Tokenizer | None) -> list[Tensor]:
        """Cut behind sentences, lines or words; without a tokenizer, behind every ``chunk_tokens``."""
        if tokenizer is None:
            return list(ids.split(self.config.chunk_tokens))
        return cut_at_sentences(ids, self.config.chunk_tokens, lambda some: str(tokenizer.decode(some)))

    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        """Run one pass over a chunk of every stream, behind its begin and the newest chunks of its source."""
        ids, states = text.need_ids(), [state_of(view) for view in views]
        begins, sources = self._begins(decoder, states), text.sources or (None,) * len(states)
        places = [self._context(*of) for of in zip(states, sources, strict=True)]
        front = Front.before_text(decoder.kept, views, places, begins)
        found = run_behind(decoder, front, ids, collect={"projected", *self.chunk_retriever.collect})
        beside = []
        for row, (view, state) in enumerate(zip(views, states, strict=True)):
            first = self._begin_ids(state, decoder.shape.first_token)
            known = self.calibrations.of(decoder, view, first, partial(begins.__getitem__, row), text.tokenizer)
            hidden = [states_[row : row + 1] for states_ in found.hidden_states]
            calibration = known["calibration"]
            (key,) = self.chunk_retriever.chunk_keys(ids[row : row + 1], hidden, calibration, text.tokenizer)
            beside.append({"begin_ids": first, "begin_rows": begins[row], "chunk_key": key, **known})
        return Update((), found.projected, beside=tuple(beside))

    def absorb(self, state: StreamState, update: Update, source: int, context: WriteContext) -> Absorbed:
        ids, own = context.ids, kv_state(state)
        count = update.projected[0].shape[0]
        if ids is None or ids.shape[0] != count:
            raise InputError(f"absorb needs the ids of the {count} tokens that the rows were made of, got {ids!r}")
        device, dtype = context.store.layout.device, context.store.layout.dtype
        births = torch.arange(own.clock, own.clock + ids.shape[0], device=device)
        for layer, made in enumerate(update.projected):
            rows = MemoryRows(None, births, torch.full_like(births, source), projected=made.to(device, dtype))
            context.store.append(layer, rows)
        beside, key = update.beside[0] if update.beside else {}, None
        # The first chunk brings the begin along, behind which all later ones are written as well.
        if beside and not own.begin_rows.shape[1]:
            own = own.with_begin(beside["begin_ids"], beside["begin_rows"].to(device, dtype))
        if beside:
            own, key = found_by(own, beside, beside["chunk_key"])
        after, evicted = self._evict(own.with_chunk(ids, source, key), context)
        return Absorbed(after, 0, evicted)

    def combine(self, state: StreamState, other: Incoming, context: WriteContext) -> Absorbed:
        other.take_stored(state, context)
        merged = merged_table(kv_state(state), other)
        after, evicted = self._evict(merged, context)
        return Absorbed(after, 0, evicted)

    def example(self, decoder: Decoder, ids: Tensor, context: WriteContext) -> StreamView:
        view = super().example(decoder, ids, context)
        return evolve(view, state=evolve(state_of(view), reads_all=True))

    def _context(self, state: KvState, source: int | None) -> Tensor:
        """Return the places of the chunks that the next one of a source is read behind; None: a source without any."""
        own = (state.chunk_source == (-1 if source is None else source)).nonzero().squeeze(1)
        most = len(own) if self.options.context_chunks is None else self.options.context_chunks
        return state.places(own[max(len(own) - most, 0) :])

    def _evict(self, state: KvState, context: WriteContext) -> tuple[KvState, int]:
        """Let whole chunks leave, those of the rows that the policy names, until the rest is within the capacity."""
        store, before = context.store, state.tokens
        while self._is_over(state, context):
            if len(state.chunk_length) == 1:
                raise ConfigError(
                    f"bytes_budget must have room for the {state.begin_rows.shape[1]} tokens that chunks are written "
                    f"behind and a chunk of {state.tokens}: give more, or lower chunk_tokens"
                )
            place = torch.searchsorted(store.ids(0), context.leaving(0, 1)).cpu()
            chunk = torch.searchsorted(state.chunk_offset, place, right=True) - 1
            places = state.places(chunk)
            for layer in range(store.layout.layers):
                ids = store.ids(layer)
                store.remove(layer, ids[places.to(ids.device)])
            kept = torch.ones_like(state.chunk_length, dtype=torch.bool)
            kept[chunk] = False
            state = state.with_chunks(kept)
        return state, before - state.tokens

    def _is_over(self, state: KvState, context: WriteContext) -> bool:
        """Return True if a stream has more tokens than it may, or takes more bytes than its share of a budget."""
        capacity, store = context.capacity, context.store
        if capacity is None or state.tokens > capacity:
            return capacity is not None
        if capacity == self.config.long_term_tokens:
            return False
        layers = store.layout.layers
        beside = layers * self.reserve(store.layout) + self.bytes_beside(capacity)
        return (
            state.nbytes + state.tokens * layers * store.bytes_per_row
            > beside + capacity * layers * store.bytes_per_row
        )
