"""The state of one stream: one batch row of a memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypedDict, Unpack

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError, NotSupported
from mplus.memory.format.columns import check_columns, forms
from mplus.memory.sources.source import SourceMarks
from mplus.memory.sources.table import SourceTable
from mplus.memory.sources.writes import WriteLog
from mplus.memory.texts import Text, Texts, Waiting
from mplus.memory.weights_state import WeightsState
from mplus.rows import MemoryRows
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore, StoreLayout, StoreView
from mplus.tokenizer import Tokenizer

LONG_TERM = "long-term"
"""What reports call the rows of a stream's store."""


class StateFields(TypedDict, total=False):
    """The attributes that the states of all mechanisms have in common; see ``StreamState``."""

    clock: int
    sources: SourceTable
    texts: Texts | None
    tail: tuple[Waiting, ...]
    weights: WeightsState | None
    writes: WriteLog


@define(frozen=True, eq=False, kw_only=True)
class StreamState:
    """Everything a stream remembers besides its store. Immutable: a write makes a new one.

    A mechanism that keeps rows or tensors besides its store derives a class of its own (``MemoryMechanism.State``). It
    has a field for each list of rows, under its name in ``lists``, and one for each of its ``tensors``. Everything else
    knows these by name only: files and journals hold what ``row_lists`` and ``tensors`` give, and ``from_parts`` takes
    it back. The methods work without a decoder, so that a memory on disk can be listed, repaired and made to forget
    without one.

    Example:
        >>> from attrs import define
        >>> @define(frozen=True, eq=False, kw_only=True)
        ... class Recent(StreamState):
        ...     lists = {"recent": "recent"}
        ...     recent: tuple  # of MemoryRows, a part for every layer
        >>> Recent(recent=(rows, rows)).counts()
        {'recent': [3, 3]}

    Attributes:
        lists: class attribute; the lists of rows by name, and what reports call their rows.
        clock: rows written so far per layer; the next birth index.
        sources: what was written, by source number.
        texts: what was written, where the memory keeps that; else None.
        tail: text that waits for more, to make up a chunk: at most one part for each source, and the one that has
            waited longest first.
        weights: what keys and values, and retriever keys, were computed with; None where nobody knows.
        writes: those that were given an id.
    """

    lists: ClassVar[Mapping[str, str]] = {}

    clock: int = 0
    sources: SourceTable = field(factory=SourceTable)
    texts: Texts | None = None
    tail: tuple[Waiting, ...] = ()
    weights: WeightsState | None = None
    writes: WriteLog = field(factory=WriteLog)

    # ------------------------------------------------------------------ what a mechanism's class defines

    def row_lists(self) -> dict[str, tuple[MemoryRows, ...]]:
        """Return all rows but those of the store, by name of their list, with a part for every list of the layout."""
        return {name: getattr(self, name) for name in self.lists}

    def with_rows(self, rows: Mapping[str, Sequence[MemoryRows]]) -> Self:
        """Return this state with other rows in its lists, and nothing else changed."""
        lists: dict[str, Any] = {name: tuple(parts) for name, parts in rows.items()}
        return evolve(self, **lists)

    def tensors(self) -> dict[str, Tensor]:
        """Return all other tensors that belong to the mechanism, by name."""
        return {}

    @classmethod
    def from_parts(
        cls,
        layout: StoreLayout,
        rows: Mapping[str, Sequence[MemoryRows]],
        tensors: Mapping[str, Tensor],
        **others: Unpack[StateFields],
    ) -> Self:
        """Make the state whose ``row_lists`` and ``tensors`` these are.

        The default passes each list and each tensor to the field of its name.

        Args:
            layout: of the rows.
            rows: by name of the list.
            tensors: by name.
            others: the common attributes.

        Raises:
            MemoryMismatchError: a list or a tensor is missing, superfluous, or of another form than the layout's.
        """
        cls.check_lists(layout, rows)
        parts: dict[str, Any] = {name: tuple(lists) for name, lists in rows.items()}
        try:
            return cls(**{**parts, **tensors, **others})
        except TypeError as error:
            raise MemoryMismatchError(f"a {cls.__name__} cannot be made of its tensors: {error}") from error

    def kept(self, places: Mapping[str, Sequence[Tensor]]) -> Self:
        """Return this state with only the rows at ``places`` (per list and layer ``[n]`` bool, or int64 positions).

        A class whose tensors say something of single rows overrides it, so that they stay in step.
        """
        lists = self.row_lists().items()
        return self.with_rows(
            {name: [rows.select(at) for rows, at in zip(parts, places[name], strict=True)] for name, parts in lists}
        )

    def forgotten(self, number: int) -> Self:
        """Return this state without what it holds of one source besides rows: its ids, sums or counts, say."""
        return self

    def without_computed(self) -> Self:
        """Return this state without what the decoder's weights made of anything but rows; it is computed when needed.

        Called when the weights have changed since, and in training, where every step changes them.
        """
        return self

    def kept_chunks(self) -> Iterable[tuple[int, int, Tensor]] | None:
        """Return number of the source, clock, and ids ``[n]`` int64 of every chunk that there are rows of, in order.

        None, the default: a state does not know them. Where it does, rows can be computed anew (``Memory.rewrite``).
        """
        return None

    def check_rewritable(self, tokenizer: Tokenizer | None) -> None:
        """Raise InputError where rows of ``kept_chunks`` need a tokenizer to be computed anew, and it is None."""

    def restarted(self, new: Self) -> Self:
        """Return ``new``, a fresh state that is written with all texts of this one, with what holds for both."""
        return new

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Self:
        """Return this state on another device, its content in another dtype."""
        return self.changed(lambda rows, name, layer: rows.to(device, dtype))

    @property
    def pass_key(self) -> Hashable:
        """The value that must be equal in streams that share one write pass."""
        return tuple(len(rows) for parts in self.row_lists().values() for rows in parts)

    @classmethod
    def births(cls, name: str, births: Tensor, clock: int) -> Tensor:
        """Return ``births`` ``[n]`` of rows of a list as numbers below ``clock``, by which their age is known."""
        return births

    def expiry_clock(self, layers: int) -> Tensor:
        """Return how far each layer's clock has come by which long-term rows expire, ``[layers]`` float64."""
        return torch.zeros(layers, dtype=torch.float64)

    @classmethod
    def mended(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[tuple[str, MemoryMismatchError]]]:
        """Return tensors that ``from_parts`` takes with ``rows``, some of which were damaged, and what that lost.

        Returns:
            The tensors, and a sentence with its reason for each one that was exchanged.
        """
        return dict(tensors), []

    def mended_with(self, store: MemoryStore) -> tuple[Self, list[str]]:
        """Bring this state and the rows of ``store`` into step, some of which were damaged and are gone.

        A class whose tensors say something of rows of the store overrides it.

        Returns:
            The state, and a sentence for each thing that was lost.
        """
        return self, []

    def check_like(self, new: StreamState, where: str) -> None:
        """Raise MemoryMismatchError unless rows have the columns of a ``new`` state of the same mechanism."""
        expected = new.row_lists()
        for name, parts in self.row_lists().items():
            for layer, (rows, other) in enumerate(zip(parts, expected[name], strict=True)):
                found, wanted = forms(rows.columns(), 1), forms(other.columns(), 1)
                if found != wanted:
                    raise MemoryMismatchError(
                        f"{name} of layer {layer} in {where} must have the columns {wanted}, got {found}"
                    )

    # ------------------------------------------------------------------ what follows from it

    @classmethod
    def check_lists(cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]]) -> None:
        """Raise MemoryMismatchError unless ``rows`` has this class's lists, for every layer, as ``layout`` says."""
        if rows.keys() != cls.lists.keys() or any(len(parts) != layout.layers for parts in rows.values()):
            found = {name: len(parts) for name, parts in rows.items()}
            raise MemoryMismatchError(
                f"a stream must have the lists of rows {', '.join(cls.lists) or 'none'} for {layout.layers} layers, "
                f"got {found}"
            )
        form = evolve(layout, expiry=False)
        for name, parts in rows.items():
            for layer, part in enumerate(parts):
                check_columns(part.columns(), form, f"{name} of layer {layer}")

    def changed(self, change: Callable[[MemoryRows, str, int], MemoryRows]) -> Self:
        """Return this state with ``change(rows, list, layer)`` in the place of every part of its lists."""
        lists = self.row_lists().items()
        return self.with_rows(
            {name: [change(rows, name, layer) for layer, rows in enumerate(parts)] for name, parts in lists}
        )

    def counts(self) -> dict[str, list[int]]:
        """Return the number of rows of each list, layer by layer."""
        return {name: [len(rows) for rows in parts] for name, parts in self.row_lists().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows and tensors of the mechanism, and of the text that waits."""
        rows = sum(rows.nbytes for parts in self.row_lists().values() for rows in parts)
        return rows + sum(tensor.nbytes for tensor in self.tensors().values()) + self.tail_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes of the text that waits."""
        return sum(part.ids.nbytes for part in self.tail)

    @property
    def tail_tokens(self) -> int:
        """Tokens that wait, of all sources together."""
        return sum(len(part.ids) for part in self.tail)

    def waiting(self, name: str | None) -> Tensor:
        """Return the ids ``[n]`` int64 of the text that waits under ``name``."""
        number = self.sources.find(name) if self.tail else None
        parts = [part.ids.long() for part in self.tail if part.source == number]
        return parts[0] if parts else torch.empty(0, dtype=torch.int64)

    def with_waiting(self, source: int, ids: Tensor | None) -> Self:
        """Let ``ids`` ``[n]``, and nothing else, wait of the source with this number; None or none: nothing of it."""
        others = tuple(part for part in self.tail if part.source != source)
        if ids is None or not len(ids):
            return self if len(others) == len(self.tail) else evolve(self, tail=others)
        return evolve(self, tail=(*others, Waiting(ids.to("cpu", torch.int32, copy=True), source)))

    def with_source(
        self,
        name: str | None,
        tokens: int,
        time: float | None = None,
        facts: SourceMarks | None = None,
        chunks: int = 1,
    ) -> tuple[Self, int]:
        """Count ``tokens`` under ``name``; returns the new state and the source's number.

        Args:
            name: of the source.
            tokens: new ones; those that waited have been counted already.
            time: the present one, in seconds since 1970; None: it is not noted.
            facts: fields of ``Source`` to set besides.
            chunks: that they come in; 0: they wait.
        """
        sources, number = self.sources.written(name, tokens, time, chunks)
        if facts:
            sources = sources.having(number, evolve(sources[number], **facts))
        return evolve(self, sources=sources), number

    def ids_of(self, number: int) -> Tensor | None:
        """Return the ids ``[n]`` of what was written from one source, in order; None: they are not kept.

        A class that keeps ids of its own overrides it.
        """
        if self.texts is None:
            return None
        waiting = [part.ids for part in self.tail if part.source == number]
        parts = [text.ids for text in self.texts.chunks() if text.source == number]
        return torch.cat([torch.empty(0, dtype=torch.int32), *parts, *waiting])

    def text_of(self, number: int) -> str | None:
        """Return the words that were written from one source, where the stream keeps them as text; else None."""
        return None

    def without_source(self, number: int) -> Self:
        """Return this state without what came from one source, its name included."""
        lists = self.row_lists().items()
        left = self.kept({name: [rows.source != number for rows in parts] for name, parts in lists})
        return evolve(
            left.forgotten(number),
            texts=None if self.texts is None else self.texts.without(number),
            tail=tuple(part for part in self.tail if part.source != number),
            sources=self.sources.without([number]),
            writes=self.writes.without(number),
        )

    def with_text(self, ids: Tensor, source: int, turn: int, short: bool = False) -> Self:
        """Keep the ids ``[n]`` of one chunk, where texts are kept."""
        if self.texts is None:
            return self
        text = Text(ids.to("cpu", torch.int32, copy=True), source, turn, short)
        return evolve(self, texts=self.texts.appended(text))


@define(frozen=True, eq=False, kw_only=True)
class PlainState(StreamState):
    """The rows and tensors, by name, that a file holds of a stream whose mechanism is not installed.

    Attributes:
        rows: the lists of rows.
        named: the other tensors.
    """

    rows: dict[str, tuple[MemoryRows, ...]] = field(factory=dict)
    named: dict[str, Tensor] = field(factory=dict)

    def row_lists(self) -> dict[str, tuple[MemoryRows, ...]]:
        return self.rows

    def with_rows(self, rows: Mapping[str, Sequence[MemoryRows]]) -> Self:
        return evolve(self, rows={name: tuple(parts) for name, parts in rows.items()})

    def tensors(self) -> dict[str, Tensor]:
        return self.named

    @classmethod
    def from_parts(
        cls,
        layout: StoreLayout,
        rows: Mapping[str, Sequence[MemoryRows]],
        tensors: Mapping[str, Tensor],
        **others: Unpack[StateFields],
    ) -> Self:
        """Take any lists and tensors."""
        lists = {name: tuple(parts) for name, parts in rows.items()}
        return cls(rows=lists, named=dict(tensors), **others)

    def forgotten(self, number: int) -> Self:
        """Raise NotSupported where there are tensors: only their mechanism knows what they hold of a source."""
        if self.named:
            raise NotSupported(
                f"forgetting needs the mechanism that the memory was made with, which alone knows what its tensors "
                f"{', '.join(sorted(self.named))} hold of a source: install its package (mplus info names it)"
            )
        return self


@define(frozen=True, eq=False)
class StreamView:
    """One stream as a read sees it: an immutable state and an immutable view of its store.

    Attributes:
        state: all but the long-term rows.
        store: these.
        access_log: where the read notes what it retrieves, if the eviction policy goes by that.
    """

    state: StreamState
    store: StoreView
    access_log: AccessLog | None = None


def alike(chunks: Sequence[Tensor], states: Sequence[StreamState]) -> list[list[int]]:
    """Return groups of positions that can share one pass: same chunk length, same ``StreamState.pass_key``."""
    groups: dict[tuple[int, Hashable], list[int]] = {}
    for place, (ids, state) in enumerate(zip(chunks, states, strict=True)):
        groups.setdefault((len(ids), state.pass_key), []).append(place)
    return list(groups.values())
