"""KvState: the table of the chunks whose keys and values a stream's store holds, and what stands in front of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack, cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError
from mplus.memory.merging.incoming import Incoming
from mplus.memory.state import StateFields, StreamState, StreamView
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.tokenizer import Tokenizer

TABLE = ("chunk_length", "chunk_source", "chunk_time", "token_ids")
"""The tensors of memories that were saved when nothing but the table was kept."""
CHAT = ("begin_ids", "opening_ids", "closing_ids")
KNOWN = ("calibration", "late_interaction")
"""What was found out about the decoder; memories that were saved before it was have none of it."""
NAMES = (*TABLE, *CHAT, "begin_rows", "chunk_key", *KNOWN)


@define(frozen=True, eq=False, kw_only=True)
class KvState(StreamState):
    """The chunks of one stream, oldest first. Their rows, one a token, lie in the store in the same order.

    All tensors but ``begin_rows`` are on the CPU, whatever the device of the rows.

    Attributes:
        chunk_length: ``[c]`` int64, tokens of each chunk.
        chunk_source: ``[c]`` int64, number of the source it was written from.
        chunk_time: ``[c]`` int64, ``clock`` when it was written: the birth of its first row.
        token_ids: ``[n]`` int32, the tokens of all chunks, one behind the other.
        begin_ids: ``[b]`` int32, the tokens that every chunk is written behind: a chat template's default prefix up to
            and including the opening of the user's turn, or the decoder's BOS; empty before the first write.
        opening_ids, closing_ids: int32, what the chat template puts in front of and behind the content of a user's
            turn; empty where there is no template, or before the first write that has a tokenizer.
        begin_rows: ``[L, b, w]``, keys (not rotated) and values of ``begin_ids``, in the dtype and on the device of the
            rows; ``[L, 0, w]`` where they have to be computed.
        chunk_key: ``[c, v]`` floating, what a retriever finds each chunk by; v is 0 where it keeps nothing.
        calibration: ``[x]`` float32, what the retriever knew of the decoder when the first chunk was written; empty
            where there was nothing to know, or no tokenizer.
        late_interaction: ``[y]`` float32, in which layers tokens are compared (``LateInteraction``); empty likewise.
        reads_all: every text reads all chunks, as a decoder is checked with when it is wrapped; never saved.
    """

    lists: ClassVar[Mapping[str, str]] = {}

    chunk_length: Tensor
    chunk_source: Tensor
    chunk_time: Tensor
    token_ids: Tensor
    begin_ids: Tensor
    opening_ids: Tensor
    closing_ids: Tensor
    begin_rows: Tensor
    chunk_key: Tensor
    calibration: Tensor
    late_interaction: Tensor
    reads_all: bool = False

    @classmethod
    def empty(cls, layout: StoreLayout) -> Self:
        """Return the state of a stream of such rows to which nothing was written."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(
            chunk_length=none,
            chunk_source=none,
            chunk_time=none,
            token_ids=none.int(),
            begin_ids=none.int(),
            opening_ids=none.int(),
            closing_ids=none.int(),
            begin_rows=torch.empty(layout.layers, 0, layout.projected_size, dtype=layout.dtype, device=layout.device),
            chunk_key=torch.empty(0, 0),
            calibration=torch.empty(0),
            late_interaction=torch.empty(0),
        )

    @property
    def chunk_offset(self) -> Tensor:
        """``[c]`` int64, place of each chunk's first token in ``token_ids``, and of its first row in every layer."""
        return self.chunk_length.cumsum(0) - self.chunk_length

    @property
    def tokens(self) -> int:
        """Tokens of all chunks together."""
        return self.token_ids.shape[0]

    def with_chunk(self, ids: Tensor, source: int, key: Tensor | None = None) -> Self:
        """Return this state with one chunk more, of ids ``[n]``, and the clock moved on.

        Args:
            ids: of the chunk.
            source: number of its source.
            key: ``[v]``, what a retriever finds it by; None: nothing.
        """
        new = torch.tensor([[ids.shape[0]], [source], [self.clock]])
        own = torch.empty(1, 0) if key is None else key.detach().to("cpu")[None]
        return evolve(
            self,
            chunk_length=torch.cat([self.chunk_length, new[0]]),
            chunk_source=torch.cat([self.chunk_source, new[1]]),
            chunk_time=torch.cat([self.chunk_time, new[2]]),
            token_ids=torch.cat([self.token_ids, ids.to("cpu", torch.int32)]),
            # The first key says how wide keys are: a table without chunks has width 0.
            chunk_key=torch.cat([self.chunk_key, own]) if len(self.chunk_key) else own,
            clock=self.clock + ids.shape[0],
        )

    def with_chunks(self, kept: Tensor) -> Self:
        """Return this state with the chunks only for which ``kept`` ``[c]`` bool is True."""
        return evolve(
            self,
            chunk_length=self.chunk_length[kept],
            chunk_source=self.chunk_source[kept],
            chunk_time=self.chunk_time[kept],
            token_ids=self.token_ids[kept.repeat_interleave(self.chunk_length)],
            chunk_key=self.chunk_key[kept],
        )

    def with_begin(self, ids: Tensor, rows: Tensor) -> Self:
        """Return this state with the tokens ``[b]`` that chunks are written behind, and their rows ``[L, b, w]``."""
        return evolve(self, begin_ids=ids.to("cpu", torch.int32), begin_rows=rows)

    def with_known(self, known: Mapping[str, Tensor]) -> Self:
        """Return this state with what was found out about the decoder: vectors by the names of ``KNOWN``."""
        calibration, values = (known[name].to("cpu", torch.float32) for name in KNOWN)
        return evolve(self, calibration=calibration, late_interaction=values)

    def without_keys(self) -> Self:
        """Return this state with nothing to find its chunks by but their ids."""
        return evolve(self, chunk_key=self.chunk_key.new_empty(len(self.chunk_key), 0), calibration=torch.empty(0))

    def without_computed(self) -> Self:
        left = evolve(self, begin_rows=self.begin_rows[:, :0])
        return left if self.tokens else left.with_known(dict.fromkeys(KNOWN, torch.empty(0)))

    def kept_chunks(self) -> Iterable[tuple[int, int, Tensor]]:
        ids = self.token_ids.long().split(self.chunk_length.tolist()) if len(self.chunk_length) else ()
        return zip(self.chunk_source.tolist(), self.chunk_time.tolist(), ids, strict=True)

    def restarted(self, new: Self) -> Self:
        return evolve(
            new,
            begin_ids=self.begin_ids,
            opening_ids=self.opening_ids,
            closing_ids=self.closing_ids,
            calibration=self.calibration,
            late_interaction=self.late_interaction,
        )

    def check_rewritable(self, tokenizer: Tokenizer | None) -> None:
        if len(self.calibration) and tokenizer is None:
            raise InputError(
                "chunks of this memory are found by hidden states, for which the retriever reads texts of its own: set "
                "memory.tokenizer before memory.rewrite()"
            )

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Self:
        return evolve(super().to(device, dtype), begin_rows=self.begin_rows.to(device, dtype))

    def places(self, chunks: Tensor) -> Tensor:
        """Return ``[n]`` int64, the places of the rows of ``chunks`` ``[k]`` int64, in that order."""
        lengths = self.chunk_length[chunks]
        starts = (self.chunk_offset[chunks] - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return starts + torch.arange(starts.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_parts(
        cls,
        layout: StoreLayout,
        rows: Mapping[str, Sequence[MemoryRows]],
        tensors: Mapping[str, Tensor],
        **others: Unpack[StateFields],
    ) -> Self:
        cls.check_lists(layout, rows)
        if tensors.keys() == set(TABLE):  # of a version that kept nothing else
            none = cls.empty(layout).tensors() | {"chunk_key": torch.empty(len(tensors["chunk_length"]), 0)}
            tensors = {**none, **tensors}
        if tensors.keys() >= set(NAMES) - set(KNOWN):
            tensors = {**dict.fromkeys(KNOWN, torch.empty(0)), **tensors}
        if tensors.keys() != set(NAMES):
            raise MemoryMismatchError(f"a table of chunks must have the tensors {NAMES}, got {sorted(tensors)}")
        parts: dict[str, Any] = {name: tensor.cpu() for name, tensor in tensors.items() if name != "begin_rows"}
        state = cls(**parts, begin_rows=tensors["begin_rows"].to(layout.device), **others)
        state._check()
        state._check_begin(layout)
        return state

    def ids_of(self, number: int) -> Tensor:
        return self.token_ids[(self.chunk_source == number).repeat_interleave(self.chunk_length)]

    def forgotten(self, number: int) -> Self:
        return self.with_chunks(self.chunk_source != number)

    @property
    def pass_key(self) -> Hashable:
        """Nothing: chunks of equal length share a pass, whatever stands in front of them."""
        return ()

    @classmethod
    def mended(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[tuple[str, MemoryMismatchError]]]:
        """Exchange a table that was damaged for one without chunks; let go of what can be computed anew."""
        clock = torch.iinfo(torch.int64).max
        table = {name: tensors[name] for name in TABLE if name in tensors}
        try:
            cls.from_parts(layout, rows, table, clock=clock)
        except MemoryMismatchError as error:
            return cls.empty(layout).tensors(), [("the table of chunks, and with it all rows", error)]
        try:
            found = cls.from_parts(layout, rows, tensors, clock=clock)
        except MemoryMismatchError as error:
            return table, [("what the chunks were written behind, and what they are found by", error)]
        # A tensor that was damaged comes as zeros, which no decoder makes of the tokens that begin a text.
        found = found if bool(found.begin_rows.any()) else found.without_computed()
        lost: list[tuple[str, MemoryMismatchError]] = []
        if len(found.calibration) and not (bool(found.calibration.any()) and bool(found.chunk_key.any())):
            lost.append(("what chunks are found by, besides their words", MemoryMismatchError("it is all zeros")))
            found = found.without_keys()
        if len(found.late_interaction) and not bool(found.late_interaction.any()):
            lost.append(("in which layers tokens are compared", MemoryMismatchError("it is all zeros")))
            found = evolve(found, late_interaction=torch.empty(0))
        return found.tensors(), lost

    def mended_with(self, store: MemoryStore) -> tuple[Self, list[str]]:
        """Keep the chunks that have all their rows in every layer; take the rows of others out of ``store``."""
        whole = torch.ones_like(self.chunk_length, dtype=torch.bool)
        births = [_births(store, layer) for layer in range(store.layout.layers)]
        for found in births:
            # Rows of a chunk are born one after the other from its time on: as many in that span as it has tokens, or
            # some are lost.
            first, last = (torch.searchsorted(found, self.chunk_time + n) for n in (0, self.chunk_length))
            whole &= last - first == self.chunk_length
        state, lost = self.with_chunks(whole), []
        for layer, found in enumerate(births):
            # The last chunk that begins no later than a row; -1: they all begin later.
            chunk = torch.searchsorted(state.chunk_time, found, right=True) - 1
            inside = torch.zeros_like(found, dtype=torch.bool)
            if len(state.chunk_time):
                ends = (state.chunk_time + state.chunk_length)[chunk.clamp(min=0)]
                inside = (chunk >= 0) & (found < ends)
            if not bool(inside.all()):
                store.remove(layer, store.ids(layer)[(~inside).to(store.layout.device)])
                lost.append(f"{int((~inside).sum())} rows of layer {layer} whose chunk is not whole")
        if not bool(whole.all()):
            lost.append(f"{int((~whole).sum())} of {len(whole)} chunks, of which rows were lost")
        return state, lost

    def check_store(self, view: StreamView) -> None:
        """Raise MemoryMismatchError unless every layer of the stream's store has one row for each token."""
        counts = [view.store.count(layer) for layer in range(view.store.layout.layers)]
        if any(count != self.tokens for count in counts):
            raise MemoryMismatchError(
                f"a stream of {self.tokens} tokens must have as many rows in every layer, got {counts}: the memory was "
                "damaged, or its store was changed from outside; mplus repair takes out what does not fit"
            )

    def _check(self) -> None:
        """Raise MemoryMismatchError unless the tensors make up a table of chunks in order of writing."""
        for name in (*TABLE, *CHAT):
            found, dtype = getattr(self, name), torch.int64 if name.startswith("chunk_") else torch.int32
            if found.dim() != 1 or found.dtype != dtype:
                raise MemoryMismatchError(f"{name} must be {dtype} [n], got {found.dtype} {list(found.shape)}")
        length, time = self.chunk_length, self.chunk_time
        if not len(length) == len(time) == len(self.chunk_source) or int(length.sum()) != self.tokens:
            raise MemoryMismatchError(
                f"a table of {len(length)} chunks of {int(length.sum())} tokens must have as many sources, times and "
                f"ids, got {len(self.chunk_source)}, {len(time)} and {self.tokens}"
            )
        # Each ends before the next one begins, and the last one before the clock.
        bounds = torch.cat([time, torch.tensor([self.clock])])
        if bool((length < 1).any()) or bool((time < 0).any()) or bool((time + length > bounds[1:]).any()):
            raise MemoryMismatchError("chunks must have at least one token each, and come one behind the other in time")

    def _check_begin(self, layout: StoreLayout) -> None:
        """Raise MemoryMismatchError unless rows of the begin and keys of chunks have the form of ``layout``'s rows."""
        rows, keys = self.begin_rows, self.chunk_key
        forms = [(layout.layers, begin, layout.projected_size) for begin in (0, len(self.begin_ids))]
        if tuple(rows.shape) not in forms or rows.dtype != layout.dtype or not bool(rows.isfinite().all()):
            raise MemoryMismatchError(
                f"begin_rows must be finite, {layout.dtype} {list(forms[1])}, got {rows.dtype} {list(rows.shape)}"
            )
        if keys.dim() != 2 or len(keys) != len(self.chunk_length) or not keys.is_floating_point():
            raise MemoryMismatchError(
                f"chunk_key must be floating [{len(self.chunk_length)}, v], got {keys.dtype} {list(keys.shape)}"
            )
        for name in KNOWN:
            found = getattr(self, name)
            if found.dim() != 1 or found.dtype != torch.float32:
                raise MemoryMismatchError(f"{name} must be torch.float32 [x], got {found.dtype} {list(found.shape)}")
        layers = self.late_interaction[:-2]
        if len(self.late_interaction) and not bool(((layers >= 0) & (layers < layout.layers)).all()):
            raise MemoryMismatchError(f"late_interaction must name layers below {layout.layers}, got {layers.tolist()}")


def state_of(view: StreamView) -> KvState:
    """Return the state in a view of a stream of this mechanism."""
    return kv_state(view.state)


def kv_state(state: StreamState) -> KvState:
    """Return the state of a stream of this mechanism, whose streams have no others."""
    return cast("KvState", state)


def _births(store: MemoryStore, layer: int) -> Tensor:
    found = store.column(layer, "birth")
    return torch.empty(0, dtype=torch.int64) if found is None else found.cpu()


# ---------------------------------------------------------------------- two tables in one


def merged_table(own: KvState, other: Incoming) -> KvState:
    """Return the state of a stream that has taken in the chunks of another one, each in its place in time.

    What one of them has found out about the decoder holds for both.

    Raises:
        MemoryMismatchError: chunks of both cannot be read together: they were written behind other tokens, or are found
            by other things.
    """
    theirs = state_of(other.view)
    if not theirs.tokens:
        return evolve(own, clock=other.order.clock)
    if own.tokens:
        state = _with_front(own, theirs)
    else:
        state = evolve(theirs.restarted(own), begin_rows=theirs.begin_rows.to(own.begin_rows))
    times = torch.cat([other.order.own(own.chunk_time), other.order.other(theirs.chunk_time)])
    sources = torch.cat([own.chunk_source, other.sources(theirs.chunk_source)])
    keys = [part.chunk_key for part in (own, theirs) if part.tokens]
    lengths, order = torch.cat([own.chunk_length, theirs.chunk_length]), times.argsort()
    ids = torch.cat([own.token_ids, theirs.token_ids]).split(lengths.tolist())
    return evolve(
        state,
        chunk_length=lengths[order],
        chunk_source=sources[order],
        chunk_time=times[order],
        token_ids=torch.cat([ids[place] for place in order.tolist()]),
        chunk_key=torch.cat(keys)[order],
        clock=other.order.clock,
    )


def _with_front(own: KvState, theirs: KvState) -> KvState:
    """Return the own stream with what it does not know. Raises MemoryMismatchError as ``merged_table``."""
    if not torch.equal(own.begin_ids, theirs.begin_ids):
        raise MemoryMismatchError(
            f"memories that are merged must have been written behind the same tokens, got {own.begin_ids.tolist()} and "
            f"{theirs.begin_ids.tolist()}: one of them was written without the tokenizer of the other"
        )
    if own.chunk_key.shape[1] != theirs.chunk_key.shape[1] or not torch.equal(own.calibration, theirs.calibration):
        raise MemoryMismatchError(
            f"memories that are merged must find their chunks by the same things, got keys of width "
            f"{own.chunk_key.shape[1]} and {theirs.chunk_key.shape[1]}: one of them was written without a tokenizer, "
            "or by another retriever, so set its tokenizer and let rewrite() compute it anew"
        )
    return evolve(
        own,
        opening_ids=own.opening_ids if len(own.opening_ids) else theirs.opening_ids,
        closing_ids=own.closing_ids if len(own.closing_ids) else theirs.closing_ids,
        late_interaction=own.late_interaction if len(own.late_interaction) else theirs.late_interaction,
    )
