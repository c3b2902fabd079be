"""What a mechanism makes of a chunk of text (``Update``, ``NewEntries``), and what it may use to store it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import InputError, MechanismError, MemoryFullError, MemoryMismatchError, NonFiniteError
from mplus.eviction.base import EvictionPolicy
from mplus.eviction.unpinned import UnpinnedRows
from mplus.memory.state import StreamState
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore, StoreLayout, StoreView

Fields = tuple[str, ...]
"""The texts of one entry of a memory of text: one of a note, three of a triple."""


@define(frozen=True, eq=False)
class NewEntries:
    """New entries of a memory of text, in order, made of one passage of every stream; or, after ``of``, of one stream.

    Attributes:
        entries: of each stream, the fields of its entries.
    """

    entries: tuple[tuple[Fields, ...], ...]

    def of(self, stream: int) -> NewEntries:
        """Return the entries of one stream."""
        return NewEntries((self.entries[stream],))

    @property
    def finite(self) -> bool:
        """True: text can always be written."""
        return True

    def check_finite(self, tokens: int, mechanism: str) -> None:
        """Return: there are no numbers."""

    def check(self, mechanism: str) -> None:
        """Raise MechanismError unless every entry is a tuple of texts, and not all of them are empty.

        Args:
            mechanism: its name, for messages.
        """
        for made in self.entries:
            for one in made:
                if not isinstance(one, tuple) or not all(isinstance(text, str) for text in one) or not any(one):
                    raise MechanismError(
                        f"the mechanism {mechanism!r}: write must return entries, a tuple of texts each of which one "
                        f"at least is not empty, got {one!r:.80}"
                    )


@define(frozen=True, eq=False)
class Update:
    """New rows, oldest first, made of one chunk of every stream of a pass; or, after ``of``, of one stream.

    Attributes:
        hidden: of each layer of the layout ``[B, k, d]`` (of one stream ``[k, d]``); () where rows are kept projected
            only and nothing else is made of them.
        projected: of each layer ``[B, k, Hkv (D + Dv)]``, ``MemoryRows.projected``; () lets the memory project
            ``hidden``, where it keeps rows projected.
        ids: ``[B, n]`` (of one stream ``[n]``), the chunks, which streams in training take in later than they are
            read; a mechanism leaves it out.
        beside: of each stream, further tensors of the mechanism's own, which ``absorb`` gets; () where there are none.
    """

    hidden: tuple[Tensor, ...]
    projected: tuple[Tensor, ...] = ()
    ids: Tensor | None = None
    beside: tuple[Mapping[str, Tensor], ...] = ()

    def of(self, stream: int) -> Update:
        """Return the rows of one stream: views of the tensors of all."""
        hidden, projected = (tuple(rows[stream] for rows in parts) for parts in (self.hidden, self.projected))
        ids = None if self.ids is None else self.ids[stream]
        # A slice, since () stays () where there is nothing beside.
        return Update(hidden, projected, ids, self.beside[stream : stream + 1])

    def detach(self) -> Update:
        """Return the same rows, cut off from the pass that made them."""
        hidden, projected = (tuple(rows.detach() for rows in parts) for parts in (self.hidden, self.projected))
        beside = tuple({name: tensor.detach() for name, tensor in one.items()} for one in self.beside)
        return Update(hidden, projected, self.ids, beside)

    @property
    def finite(self) -> bool:
        """True if there is no NaN and no Inf in any row."""
        return all(bool(torch.isfinite(rows).all()) for rows in (*self.hidden, *self.projected))

    def check_finite(self, tokens: int, mechanism: str) -> None:
        """Raise NonFiniteError, with the layer, where there is NaN or Inf in rows made of a chunk of ``tokens``."""
        made = f"for a chunk of {tokens} tokens (write of the mechanism {mechanism!r})"
        for layer, rows in enumerate(self.hidden):
            check_finite(rows, f"in layer {layer} {made}")
        for layer, rows in enumerate(self.projected):
            check_finite(rows, f"in keys and values of layer {layer} {made}")

    def check(self, mechanism: str, streams: int, layouts: Sequence[StoreLayout]) -> None:
        """Raise MechanismError unless these can be the rows of so many streams.

        Args:
            mechanism: its name, for messages.
            streams: B.
            layouts: of the streams' rows.
        """
        said = f"the mechanism {mechanism!r}: write must return"
        if not isinstance(self, Update) or not (self.hidden or self.projected):
            got = "none" if isinstance(self, Update) else type(self).__name__
            raise MechanismError(f"{said} an Update with hidden states or projections of rows, got {got}")
        for layout in layouts:
            widths = {"hidden": (self.hidden, layout.hidden_size), "projected": (self.projected, layout.projected_size)}
            if layout.keeps_hidden and not self.hidden:
                raise MechanismError(f"{said} hidden states of rows, as these memories keep them, got projections only")
            for name, (layers, width) in widths.items():
                if layers:
                    _check_layers(f"{said} {name} rows", layers, streams, layout.layers, width)
        if self.beside and len(self.beside) != streams:
            raise MechanismError(f"{said} something beside rows for each of {streams} streams, got {len(self.beside)}")
        counts = {rows.shape[1] for rows in (*self.hidden, *self.projected)}
        if len(counts) > 1:
            raise MechanismError(f"{said} equally many rows for every layer, got {sorted(counts)}")


def check_state(state: object, of: type[StreamState], layout: StoreLayout, mechanism: str, said: str) -> None:
    """Raise MechanismError unless ``state`` is of class ``of`` and has the lists of rows that its layout says.

    Args:
        state: what a method of the mechanism returned.
        of: the class of its states.
        layout: of the stream's rows.
        mechanism: its name, for messages.
        said: the method and what it must return, for messages.
    """
    told = f"the mechanism {mechanism!r}: {said} state"
    if type(state) is not of:  # that of a derived class would not be read from a file again
        raise MechanismError(f"{told} of class {of.__name__}, got {type(state).__name__}")
    try:
        state.check_lists(layout, state.row_lists())
    except MemoryMismatchError as error:
        raise MechanismError(f"{told} whose lists of rows are as its layout says: {error}") from error


def absorbed_by(
    mechanism: Any, state: StreamState, update: object, source: int, context: WriteContext
) -> Any:  # Absorbed; typed there, because mechanisms build on memory
    """Return what the mechanism's ``absorb`` gives, checked.

    Args:
        mechanism: a ``Mechanism``.
        state, update, source, context: as for ``Mechanism.absorb``.

    Raises:
        MechanismError: rows that its store has no room for, or a state that ``state`` cannot become.
    """
    try:
        absorbed = mechanism.absorb(state, update, source, context)
    except (IndexError, InputError) as error:  # of a store that was given rows it has no room for, say
        raise MechanismError(f"the mechanism {mechanism.name!r}: absorb failed: {error}") from error
    check_absorbed(absorbed, state, context.store.layout, mechanism.name)
    return absorbed


def check_absorbed(absorbed: object, given: StreamState, layout: StoreLayout, mechanism: str) -> None:
    """Raise MechanismError unless ``absorb`` returned a state that ``given`` can become.

    Args:
        absorbed: what it returned.
        given: the state that it was given.
        layout: of the stream's rows.
        mechanism: its name, for messages.
    """
    said = f"the mechanism {mechanism!r}: absorb must return"
    state = getattr(absorbed, "state", None)
    if not isinstance(state, type(given)):
        got = type(absorbed).__name__ + ("" if state is None else f" of {type(state).__name__}")
        raise MechanismError(f"{said} an Absorbed with a state of class {type(given).__name__}, got {got}")
    # The very objects: these are the memory's, and a mechanism hands them on untouched.
    if any(getattr(state, name) is not getattr(given, name) for name in ("sources", "texts", "tail", "writes")):
        raise MechanismError(
            f"{said} the state that it was given with changes (attrs.evolve), got one with sources, texts or a tail of "
            "its own"
        )
    if state.clock < given.clock:
        raise MechanismError(f"{said} a state whose clock is at least {given.clock}, as it was, got {state.clock}")
    check_state(state, type(given), layout, mechanism, "absorb must return a")


def _check_layers(said: str, layers: Sequence[Tensor], streams: int, expected: int, width: int) -> None:
    if len(layers) != expected:
        raise MechanismError(f"{said} of the {expected} layers of its layout, got those of {len(layers)} layers")
    for layer, rows in enumerate(layers):
        if rows.dim() != 3 or rows.shape[0] != streams or rows.shape[2] != width or not rows.is_floating_point():
            raise MechanismError(
                f"{said} of layer {layer} as floating [{streams}, k, {width}], got {rows.dtype} {list(rows.shape)}"
            )


def check_finite(values: Tensor, where: str) -> None:
    """Raise NonFiniteError when there is NaN or Inf in what a decoder computed."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"what the decoder computes must be finite, got NaN or Inf {where}; the chunk was not written: "
            f"check the weights, or use a wider dtype than {values.dtype}"
        )


Draw = Callable[[int], Tensor]
"""``draw(n)``: a uniform random permutation of 0..n-1, int64 on the CPU."""

Keys = Callable[[int, Tensor], Tensor | None]
"""``keys(layer, hidden [m, d])``: retriever keys ``[m, r]``, or None."""


@define(frozen=True, eq=False)
class WriteContext:
    """The store, draws and limits that a mechanism may use and change while a stream takes in new rows.

    Attributes:
        store: the stream's long-term rows; the caller undoes changes if anything fails.
        eviction: chooses rows when the store is over its capacity.
        draw: source of random permutations.
        keys: makes retriever keys.
        ids: ``[n]`` int64, the text that the rows were made of.
        capacity: long-term rows that a layer may hold; None: no limit.
        access_log: notes on what was retrieved, where ``eviction`` goes by them.
        pinned: ``[p]`` int64, numbers of the sources whose rows must not leave; None: there are none.
    """

    store: MemoryStore
    eviction: EvictionPolicy
    draw: Draw
    keys: Keys
    ids: Tensor | None = None
    capacity: int | None = None
    access_log: AccessLog | None = None
    pinned: Tensor | None = None

    def leaving(self, layer: int, excess: int) -> Tensor:
        """Return the ids ``[excess]`` int64 of the rows of a list that the eviction policy lets leave, none pinned.

        Raises:
            MemoryFullError: there are not so many that may.
            MechanismError: the policy chose another number, or rows twice.
        """
        if self.access_log is not None:
            self.access_log.trim(layer, self.store)  # rows that have left are never asked for again
        free = self.evictable
        if free.count(layer) < excess:
            raise MemoryFullError(
                f"{excess} long-term rows of layer {layer} must leave, and only {free.count(layer)} are not of pinned "
                "sources: unpin or forget a source, or give the memory more capacity; the chunk was not written"
            )
        ids = self.eviction.with_access_log(self.access_log).select(free, layer, excess)
        said = f"the eviction policy {self.eviction.name!r}: select must return ids [{excess}] int64 of different rows"
        if not isinstance(ids, Tensor):
            raise MechanismError(f"{said} of layer {layer}, got {type(ids).__name__}")
        if ids.shape != (excess,) or ids.dtype != torch.int64 or len(ids.unique()) != excess:
            raise MechanismError(f"{said} of layer {layer}, got {ids.dtype} {list(ids.shape)} {ids.tolist()[:8]}")
        return ids

    @property
    def evictable(self) -> StoreView:
        """The long-term rows that may leave: all but those of pinned sources."""
        return self.store if self.pinned is None else UnpinnedRows(self.store, self.pinned)

    def evict(self) -> list[int]:
        """Remove the rows of each list of the store that are beyond its capacity, as the eviction policy chooses.

        Returns:
            How many left each list.

        Raises:
            MemoryFullError: too many of the others are pinned.
        """
        store, evicted = self.store, [0] * self.store.layout.layers
        if self.capacity is None:
            return evicted
        for layer in range(len(evicted)):
            excess = store.count(layer) - self.capacity
            if excess > 0:
                store.remove(layer, self.leaving(layer, excess))
                evicted[layer] = excess
        return evicted
