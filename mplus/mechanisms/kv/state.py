"""KvState: the table of the chunks whose keys and values a stream's store holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.state import StreamState, StreamView
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout

NAMES = ("chunk_length", "chunk_source", "chunk_time", "token_ids")


@define(frozen=True, eq=False, kw_only=True)
class KvState(StreamState):
    """The chunks of one stream, oldest first. Their rows, one a token, lie in the store in the same order.

    All tensors are on the CPU, whatever the device of the rows.

    Attributes:
        chunk_length: ``[c]`` int64, tokens of each chunk.
        chunk_source: ``[c]`` int64, number of the source it was written from.
        chunk_time: ``[c]`` int64, ``clock`` when it was written: the birth of its first row.
        token_ids: ``[n]`` int32, the tokens of all chunks, one behind the other.
    """

    lists: ClassVar[Mapping[str, str]] = {}

    chunk_length: Tensor
    chunk_source: Tensor
    chunk_time: Tensor
    token_ids: Tensor

    @classmethod
    def empty(cls) -> Self:
        """Return the state of a stream to which nothing was written."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(chunk_length=none, chunk_source=none, chunk_time=none, token_ids=none.int())

    @property
    def chunk_offset(self) -> Tensor:
        """``[c]`` int64, place of each chunk's first token in ``token_ids``, and of its first row in every layer."""
        return self.chunk_length.cumsum(0) - self.chunk_length

    @property
    def tokens(self) -> int:
        """Tokens of all chunks together."""
        return self.token_ids.shape[0]

    def with_chunk(self, ids: Tensor, source: int) -> Self:
        """Return this state with one chunk more, of ids ``[n]``, and the clock moved on."""
        new = torch.tensor([[ids.shape[0]], [source], [self.clock]])
        return evolve(
            self,
            chunk_length=torch.cat([self.chunk_length, new[0]]),
            chunk_source=torch.cat([self.chunk_source, new[1]]),
            chunk_time=torch.cat([self.chunk_time, new[2]]),
            token_ids=torch.cat([self.token_ids, ids.to("cpu", torch.int32)]),
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
        )

    def places(self, chunks: Tensor) -> Tensor:
        """Return ``[n]`` int64, the places of the rows of ``chunks`` ``[k]`` int64, in that order."""
        lengths = self.chunk_length[chunks]
        starts = (self.chunk_offset[chunks] - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return starts + torch.arange(starts.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_parts(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor], **others: Any
    ) -> Self:
        cls.check_lists(layout, rows)
        if tensors.keys() != set(NAMES):
            raise MemoryMismatchError(f"a table of chunks must have the tensors {NAMES}, got {sorted(tensors)}")
        parts: dict[str, Any] = {name: tensor.cpu() for name, tensor in tensors.items()}
        state = cls(**parts, **others)
        state._check()
        return state

    def forgotten(self, number: int) -> Self:
        return self.with_chunks(self.chunk_source != number)

    @property
    def pass_key(self) -> Any:
        """Nothing: chunks of equal length share a pass, whatever stands in front of them."""
        return ()

    @classmethod
    def mended(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[tuple[str, MemoryMismatchError]]]:
        """Exchange a table that was damaged for one without chunks."""
        try:
            cls.from_parts(layout, rows, tensors, clock=torch.iinfo(torch.int64).max)
        except MemoryMismatchError as error:
            return cls.empty().tensors(), [("the table of chunks, and with it all rows", error)]
        return dict(tensors), []

    def mended_with(self, store: MemoryStore) -> tuple[Self, list[str]]:
        """Keep the chunks that have all their rows in every layer; take the rows of others out of ``store``."""
        whole = torch.ones_like(self.chunk_length, dtype=torch.bool)
        births = [_births(store, layer) for layer in range(store.layout.layers)]
        for found in births:
            first, last = (torch.searchsorted(found, self.chunk_time + n) for n in (0, self.chunk_length))
            whole &= last - first == self.chunk_length
        state, lost = self.with_chunks(whole), []
        for layer, found in enumerate(births):
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
        for name in NAMES:
            found, dtype = getattr(self, name), torch.int32 if name == "token_ids" else torch.int64
            if found.dim() != 1 or found.dtype != dtype:
                raise MemoryMismatchError(f"{name} must be {dtype} [n], got {found.dtype} {list(found.shape)}")
        length, time = self.chunk_length, self.chunk_time
        if not len(length) == len(time) == len(self.chunk_source) or int(length.sum()) != self.tokens:
            raise MemoryMismatchError(
                f"a table of {len(length)} chunks of {int(length.sum())} tokens must have as many sources, times and "
                f"ids, got {len(self.chunk_source)}, {len(time)} and {self.tokens}"
            )
        bounds = torch.cat([time, torch.tensor([self.clock])])
        if bool((length < 1).any()) or bool((time < 0).any()) or bool((time + length > bounds[1:]).any()):
            raise MemoryMismatchError("chunks must have at least one token each, and come one behind the other in time")


def state_of(view: StreamView) -> KvState:
    """Return the state in a view of a stream of this mechanism."""
    return cast("KvState", view.state)


def _births(store: MemoryStore, layer: int) -> Tensor:
    found = store.column(layer, "birth")
    return torch.empty(0, dtype=torch.int64) if found is None else found.cpu()
