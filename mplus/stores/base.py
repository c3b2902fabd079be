"""MemoryStore: where the long-term rows of one memory live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Protocol, cast

import attrs
import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import ConfigError, InputError
from mplus.rows import OWN_COLUMNS, MemoryRows

Column = Literal["birth", "source", "key", "expiry"]
Content = Literal["hidden", "projected"]

TAKEN = OWN_COLUMNS | {"id", "ids", "stay", "index"}
"""Names that a further column of rows cannot have: those of other columns, and of what stands beside them in files."""

Extra = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""Further columns: the name of each, the shape of one row in it, and its dtype."""


def _check_extra(instance: attrs.AttrsInstance, attribute: attrs.Attribute[Extra], value: Extra) -> None:
    names = [name for name, _, _ in value]
    wrong = [name for name in names if not name.isidentifier() or name in TAKEN or names.count(name) > 1]
    if wrong:
        raise ConfigError(
            f"extra columns of a StoreLayout must have names of their own, which are words and none of "
            f"{', '.join(sorted(TAKEN))}, got {wrong[0]!r}"
        )


@define(frozen=True, kw_only=True)
class StoreLayout:
    """The form of the rows of a store: sizes, dtypes and device.

    Attributes:
        layers: lists of rows; as a rule one for each layer that carries memory.
        hidden_size: width d of ``MemoryRows.hidden``, also where hidden states are not kept.
        key_size: width r of ``MemoryRows.key``; 0 where rows have no key.
        expiry: whether rows carry ``MemoryRows.expiry``.
        dtype: dtype of ``hidden`` and ``key``.
        device: where the rows are kept.
        projected_size: width of ``MemoryRows.projected``; 0 where rows have no projections.
        keeps_hidden: whether rows have ``MemoryRows.hidden``.
        key_dtype: dtype of ``key``, where it is another one; None: ``dtype``.
        extra: name, shape of one row and dtype of each column in ``MemoryRows.extra``; none of them has the name of
            another column.
        transposed_keys: keys lie best as ``[r, m]`` (see ``Retriever``); a store need not, and layouts compare equal.
    """

    layers: int
    hidden_size: int
    key_size: int = 0
    expiry: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    projected_size: int = 0
    keeps_hidden: bool = True
    key_dtype: torch.dtype | None = None
    extra: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = field(default=(), validator=_check_extra)
    transposed_keys: bool = field(default=False, eq=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, all columns together."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.columns().values())

    def columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape of one row and dtype of every column of ``MemoryRows`` that rows of this layout carry."""
        columns: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "birth": ((), torch.int64),
            "source": ((), torch.int64),
        }
        if self.keeps_hidden:
            columns["hidden"] = ((self.hidden_size,), self.dtype)
        if self.projected_size:
            columns["projected"] = ((self.projected_size,), self.dtype)
        if self.key_size:
            columns["key"] = ((self.key_size,), self.key_dtype or self.dtype)
        if self.expiry:
            columns["expiry"] = ((), torch.float64)
        return {**columns, **{name: (shape, dtype) for name, shape, dtype in self.extra}}

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> StoreLayout:
        """Return the layout of the same rows on another device, or in another dtype; None: as it is."""
        where = self.device if device is None else torch.device(device)
        return evolve(self, device=where, dtype=self.dtype if dtype is None else dtype)

    def check(self, rows: MemoryRows) -> None:
        """Raise InputError (a ValueError) unless ``rows`` have exactly this layout's columns; any device will do."""
        expected, given = self.columns(), rows.columns()
        if given.keys() != expected.keys():
            raise InputError(f"rows of this store must have the columns {sorted(expected)}, got {sorted(given)}")
        for name, (shape, dtype) in expected.items():
            column = given[name]
            if tuple(column.shape) != (len(rows), *shape) or column.dtype != dtype:
                wanted, got = f"{[len(rows), *shape]} {dtype}", f"{list(column.shape)} {column.dtype}"
                raise InputError(f"column {name!r} of {len(rows)} rows must be {wanted}, got {got}")


class ChunkCache(dict[str, Any]):
    """Whatever readers found out about the rows of a chunk, by names of their own."""


@define(frozen=True, eq=False)
class Chunk:
    """Rows of one layer that lie together; the chunks of a layer, in order, hold all of its rows.

    Attributes:
        ids: ``[m]`` int64, ascending, also from chunk to chunk.
        live: ``[m]`` bool, False where a row was removed and its place holds anything; None: there are no such places.
        columns: name -> ``[m, ...]``, the columns that were asked for and that the layout has.
        cache: what readers found out about these rows and keep with them, by names of their own; it is there again
            in the next ``chunks`` while the rows stay the same ones, if the store can.
        inherited_cache: what readers found out that stays true of any part of these rows, whether or not others follow
            them. A copy of it is in every chunk made of this one by removing and appending, if the store can.
    """

    ids: Tensor
    live: Tensor | None
    columns: Mapping[str, Tensor]
    cache: ChunkCache = field(factory=ChunkCache)
    inherited_cache: ChunkCache = field(factory=ChunkCache)


def chunk_min(chunk: Chunk, name: Literal["birth", "expiry"]) -> float:
    """Return the smallest number in a column that the chunk has; kept in its ``cache``. The chunk must not be empty."""
    key = f"smallest {name}"
    if key not in chunk.cache:
        column = chunk.columns[name]
        if chunk.live is not None:
            # Removed rows still lie in the column: whatever they hold, none of them may be the smallest.
            largest = torch.inf if column.is_floating_point() else torch.iinfo(column.dtype).max
            column = column.masked_fill(~chunk.live, largest)
        chunk.cache[key] = column.min().item()
    found: float = chunk.cache[key]
    return found


@define(frozen=True, eq=False)
class Location:
    """Where the content of n rows lies that were looked for.

    Attributes:
        parts: columns ``[m, w]`` and the places ``[n_i]`` int64 of rows in each.
        order: ``[n]`` int64, for each row in the order that was asked for, its number among the places of all parts,
            one part behind the other; None: they are in that order.
    """

    parts: Sequence[tuple[Tensor, Tensor]]
    order: Tensor | None = None

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Return one column with all rows, and their places in the order asked for; of one part nothing is copied."""
        if len(self.parts) == 1:
            column, places = self.parts[0]
            return column, places if self.order is None else places[self.order]
        first, count = self.parts[0][0], sum(len(places) for _, places in self.parts)
        rows = first.new_empty(count, *first.shape[1:])
        Location(self.parts).copy_to(rows)
        return rows, torch.arange(rows.shape[0], device=rows.device) if self.order is None else self.order

    def copy_to(self, out: Tensor) -> None:
        """Copy the rows, in the order that was asked for, to ``out`` ``[n, w]``."""
        if self.order is None and self.parts[0][0].dtype == out.dtype and self.parts[0][0].device == out.device:
            targets = out.split([places.shape[0] for _, places in self.parts])
            for (column, places), target in zip(self.parts, targets, strict=True):
                torch.index_select(column, 0, places, out=target)
            return
        column, places = self.contiguous()
        out.copy_(column.index_select(0, places))


class Identity:
    """Identity of a store, to be compared and referred to weakly; it holds nothing."""

    __slots__ = ("__weakref__",)


class FoundRows(Protocol):
    """Rows of one layer that were looked for by their ids, once for all of their columns."""

    def take(self, name: str) -> Tensor:
        """Return a column of these rows ``[n, ...]``, a copy."""

    def located(self, name: str) -> Location:
        """Return where a column of these rows lies."""

    def at(self, order: Tensor) -> FoundRows:
        """Return those at ``order`` ``[n]`` int64, in that order."""


class StoreView(ABC):
    """The reading side of a store. A view taken by ``MemoryStore.snapshot`` never changes.

    Rows are known by **ids**: int64, unique within a layer for the life of the store, growing in order of appending.

    Attributes:
        layout: what the rows look like.
        identity: the same object for a store and its snapshots, another for every other store, forks included: what an
            index made of a store's rows is kept under, weakly. None: ids do not outlast the view.
    """

    layout: StoreLayout
    identity: Identity | None = None

    @abstractmethod
    def ids(self, layer: int) -> Tensor:
        """Return ``[m]`` int64, ascending: ids of the rows of ``layer``."""

    @abstractmethod
    def column(self, layer: int, name: Column) -> Tensor | None:
        """Return one column of all rows in the order of ``ids``; None where the layout has no such column."""

    @abstractmethod
    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        """Return the rows with these ids (``[n]`` int64, any order, repeats allowed), in that order.

        Args:
            layer: index among the layers that carry memory.
            ids: of the rows.
            leave_out: columns that are not wanted; a store may give them all the same.

        Raises:
            KeyError: an id is not in the store; the message names it.
        """

    def find(self, layer: int, ids: Tensor) -> FoundRows | None:
        """Return where the rows with these ids (``[n]`` int64, any order) lie; None: readers use ``gather``.

        Raises:
            KeyError: an id is not in the store.
        """
        return None

    def content(self, layer: int, name: Content) -> Tensor | None:
        """Return the content of all rows in the order of ``ids``, where it lies as one tensor; None elsewhere.

        Readers that get None use ``gather``. Nothing is copied.
        """
        return None

    def locate(self, layer: int, name: Content, ids: Tensor) -> Location | None:
        """Return where the content of the rows with these ids (``[n]`` int64, n of at least 1, any order) lies.

        None where it does not lie anywhere as it is read; readers use ``gather`` then.

        Raises:
            KeyError: an id is not in the store; a store may leave finding that to ``gather``.
        """
        column = self.content(layer, name)
        return None if column is None else Location([(column, torch.searchsorted(self.ids(layer), ids))])

    def chunks(self, layer: int, *names: Column | Content) -> Sequence[Chunk]:
        """Return all rows of ``layer`` where they lie, without a copy if the store can: for reading over all of them.

        Args:
            layer: index among the layers that carry memory.
            names: columns that are wanted.
        """
        ids = self.ids(layer)
        columns: dict[str, Tensor] = {}
        for name in names:
            if name in ("hidden", "projected"):
                found = self.content(layer, name) if name in self.layout.columns() else None
                if found is None and name in self.layout.columns():
                    found = self.gather(layer, ids).columns()[name]
            else:
                found = self.column(layer, cast("Column", name))
            if found is not None:
                columns[name] = found
        return [Chunk(ids, None, columns)]

    def count(self, layer: int) -> int:
        """Return the number of rows of ``layer``."""
        return self.ids(layer).shape[0]

    def revision(self, layer: int) -> int | None:
        """Return how often ``layer`` had changed by the time of this view; None where that is not counted.

        Of two views of one ``identity``, an equal number means the same rows and a greater one a later moment, whether
        or not rows came back by ``restore`` in between.
        """
        return None

    def keys(self, layer: int) -> Tensor | None:
        """Return ``[m, r]`` retriever keys of ``layer`` in the order of ``ids``, or None."""
        return self.column(layer, "key")


class MemoryStore(StoreView):
    """Long-term rows of every layer of one memory (one store per batch row).

    Subclasses are built as ``Store(layout, options)``, where ``options`` is an instance of ``Store.Options``.
    Methods that change the store either finish or leave it as it was.

    Example:
        >>> import torch
        >>> from mplus.config import Component
        >>> from mplus.stores import STORES, MemoryRows, StoreLayout
        >>> store = STORES.build(Component("ram"), StoreLayout(layers=1, hidden_size=8))
        >>> rows = MemoryRows(hidden=torch.randn(3, 8), birth=torch.arange(3), source=torch.zeros(3, dtype=torch.int64))
        >>> ids = store.append(0, rows)
        >>> before = store.snapshot()
        >>> store.remove(0, ids[:1])
        >>> store.count(0), before.count(0)
        (2, 3)
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the implementation (attrs class; the base class has none)."""

    name: ClassVar[str]
    transparent: ClassVar[bool] = False
    """Whether rows lie in another store, ``inner``, as they would without this one (a cache, say)."""

    def __init__(self, layout: StoreLayout, options: MemoryStore.Options | None = None) -> None:
        self.layout = layout
        self.identity: Identity | None = Identity()
        self.options = options if options is not None else self.Options()

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row of one layer takes, its id included."""
        return self.layout.row_bytes + 8

    def bytes_for(self, rows: int) -> int:
        """Return the bytes of a layer under ``set_capacity(rows)``, at most: what a budget's capacity is reckoned with.

        By default the rows alone; it grows with ``rows``.
        """
        return rows * self.bytes_per_row

    def set_capacity(self, rows: int) -> None:
        """Be told that no layer holds more than ``rows`` rows but while rows are added, before others leave for them.

        A store that reserves room keeps to ``bytes_for(rows)`` bytes for each layer from now on, as do its forks.
        """

    @abstractmethod
    def append(self, layer: int, rows: MemoryRows) -> Tensor:
        """Add copies of ``rows`` at the end of ``layer``.

        Returns:
            ``[n]`` int64, the new ids: larger than any id ever given in this layer.

        Raises:
            ValueError: a column is missing, superfluous or has the wrong width or dtype.
        """

    @abstractmethod
    def remove(self, layer: int, ids: Tensor) -> None:
        """Delete the rows with these ids. Raises KeyError, naming one, when an id is not in the store."""

    @abstractmethod
    def snapshot(self) -> StoreView:
        """Return an immutable view of the present rows, taken without copying them."""

    @abstractmethod
    def restore(self, snapshot: StoreView) -> None:
        """Go back to a snapshot taken from this store; ids given since then are never given again."""

    @abstractmethod
    def fork(self) -> MemoryStore:
        """Return an independent store with the same rows and ids; changing one never shows in the other."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryStore:
        """Return a store with the same rows and ids on another device or in another dtype."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes reserved for rows, spare capacity included."""

    def close(self) -> None:
        """Release what the store holds outside the process's memory (files, handles); idempotent."""


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that can be written and differentiated through later, even in a caller's inference mode."""
    # Both: to leave inference mode turns gradients on, also where the caller had them off.
    with torch.inference_mode(False), torch.no_grad():
        yield


def parts_of(store: MemoryStore) -> list[MemoryStore]:
    """Return a store, the one it wraps, the one that this wraps, and so on."""
    parts = [store]
    while isinstance(inner := getattr(parts[-1], "inner", None), MemoryStore):
        parts.append(inner)
    return parts
