"""QuantizedStore: rows in 8 bits, in a store of another kind."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.config import Component, as_component, flag, one_of, whole
from mplus.errors import ConfigError, MemoryMismatchError
from mplus.rows import MemoryRows
from mplus.stores import STORES
from mplus.stores.base import Chunk, Column, Content, MemoryStore, StoreLayout, StoreView
from mplus.stores.quantizing import FORMATS, Format, arithmetic_of, groups_of, quantised, restored
from mplus.stores.wrapping import WrappingStore, WrappingView

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDE = ("hidden", "projected", "key")
"""Columns that can be quantised."""


@define(frozen=True)
class Coding:
    """The form in which a store of 8 bits keeps its columns.

    Attributes:
        layout: of the rows as they are read.
        form: of the codes.
        group: numbers that share a scale.
        names: columns that are quantised.
        arithmetic: dtype in which numbers are computed from codes.
        key_dtype: dtype in which keys are kept that are not quantised.
    """

    layout: StoreLayout
    form: Format
    group: int
    names: tuple[str, ...]
    arithmetic: torch.dtype
    key_dtype: torch.dtype

    @property
    def inner(self) -> StoreLayout:
        """Layout of the rows as they are kept."""
        columns = self.layout.columns()
        exponents = tuple(
            (_exponent(name), (groups_of(columns[name][0][0], self.group),), torch.int16) for name in self.names
        )
        key_dtype = None if "key" in self.names else self.key_dtype
        return evolve(self.layout, dtype=self.form.codes, key_dtype=key_dtype, extra=(*self.layout.extra, *exponents))

    def encode(self, rows: MemoryRows) -> MemoryRows:
        """Return rows as they are kept. Raises NonFiniteError for NaN or Inf in what is quantised."""
        columns = rows.columns()
        for name in self.names:
            columns[name], columns[_exponent(name)] = quantised(columns[name].detach(), self.form, self.group)
        if "key" in columns and "key" not in self.names:
            columns["key"] = columns["key"].to(self.key_dtype)
        return MemoryRows.of(columns)

    def needed(self, names: Collection[str]) -> list[str]:
        """Return the columns that are kept, for those that are wanted."""
        return [*names, *(_exponent(name) for name in self.names if name in names)]

    def decoded(self, name: str, kept: Mapping[str, Tensor]) -> Tensor:
        """Return one column as it is read, from those that are kept."""
        dtype = self.layout.dtype
        if name not in self.names:
            return kept[name].to(dtype) if name in WIDE else kept[name]
        return restored(kept[name], kept[_exponent(name)], self.form, self.group, dtype, self.arithmetic)

    def decode(self, rows: MemoryRows) -> MemoryRows:
        """Return rows as they are read, of the columns that are there."""
        kept = rows.columns()
        return MemoryRows.of({name: self.decoded(name, kept) for name in self.layout.columns() if name in kept})


@define(frozen=True, eq=False)
class _DecodedColumns(Mapping[str, Tensor]):
    """Columns of a chunk; each is computed when it is asked for, and not kept."""

    coding: Coding
    kept: Mapping[str, Tensor]
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.coding.decoded(name, self.kept)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _QuantizedReader(WrappingView):
    """Reads quantised rows of an inner view."""

    coding: Coding

    def ids(self, layer: int) -> Tensor:
        """Return ``[m]`` int64, ascending: those of the inner view."""
        return self.inner.ids(layer)

    def column(self, layer: int, name: Column) -> Tensor | None:
        """Return one column of all rows; what is quantised is computed anew each time: ``chunks`` need less memory."""
        if name not in self.layout.columns():
            return None
        kept = {part: self.inner.column(layer, cast("Column", part)) for part in self.coding.needed([name])}
        return self.coding.decoded(name, cast("dict[str, Tensor]", kept))

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        """Return copies of the rows with these ids. Raises KeyError naming a missing one."""
        unread = cast("list[Column]", self.coding.needed(leave_out))
        return self.coding.decode(self.inner.gather(layer, ids, unread))

    def chunks(self, layer: int, *names: Column | Content) -> Sequence[Chunk]:
        """Return the chunks of the inner store; quantised columns are computed when they are looked at."""
        wanted = tuple(name for name in names if name in self.layout.columns())
        needed = cast("list[Column]", self.coding.needed(wanted))
        return [
            # The chunk stays the same one, with what readers keep with it; only its columns are decoded late.
            evolve(chunk, columns=_DecodedColumns(self.coding, chunk.columns, wanted))
            for chunk in self.inner.chunks(layer, *needed)
        ]


class QuantizedView(_QuantizedReader):
    """The rows of a ``QuantizedStore`` at one moment."""

    def __init__(self, coding: Coding, inner: StoreView) -> None:
        self.coding, self.inner, self.layout, self.identity = coding, inner, coding.layout, inner.identity


class QuantizedStore(_QuantizedReader, WrappingStore):
    """Hidden states, keys and values and retriever keys in 8 bits; birth, source, expiry and others as they are.

    Each row is divided into groups that share a scale, a power of two (so a store that is saved and loaded has the
    same rows). A number x of a group with the scale s reads back as x' with ``|x - x'| <= s / 2`` for int8, where
    ``127 s / 2 < max |x| <= 127 s``, and ``|x - x'| <= max(|x| / 16, s / 1024)`` for fp8. Rows with NaN or Inf are
    refused.
    """

    @define(frozen=True, kw_only=True)
    class Options(MemoryStore.Options):
        """Where the rows are kept and how.

        Attributes:
            inner: the store that holds them, by name or with options.
            format: "int8", or "fp8" (e4m3, coarser for the large numbers of a group and finer for the small ones).
            group: numbers of a row that share a scale; each scale takes two bytes.
            keys: whether retriever keys are quantised, too; otherwise they stay in the dtype the store was made with.
        """

        inner: Component = field(default=Component("ram"), converter=as_component)
        format: Literal["int8", "fp8"] = field(default="int8", validator=one_of(*FORMATS))
        group: int = field(default=64, validator=whole(1))
        keys: bool = field(default=True, validator=flag)

    options: Options
    name: ClassVar[str] = "quantized"

    def __init__(self, layout: StoreLayout, options: MemoryStore.Options | None = None) -> None:
        MemoryStore.__init__(self, layout, options)
        names = tuple(name for name in WIDE if name in layout.columns() and (name != "key" or self.options.keys))
        taken = [name for name in map(_exponent, names) if name in layout.columns()]
        if not layout.dtype.is_floating_point or taken:
            raise ConfigError(
                f"store 'quantized' takes rows of floating numbers without columns {[*map(_exponent, names)]}, got "
                f"{taken or layout.dtype}: rows in 8 bits cannot be quantised again, put another store inside"
            )
        form = FORMATS[self.options.format]
        self.coding = Coding(layout, form, self.options.group, names, arithmetic_of(layout.dtype), layout.dtype)
        self._hold(STORES.build(self.options.inner, self.coding.inner))

    def append(self, layer: int, rows: MemoryRows) -> Tensor:
        """Append ``rows`` in 8 bits. Raises InputError for another layout, NonFiniteError for NaN or Inf."""
        self.layout.check(rows)
        return self.inner.append(layer, self.coding.encode(rows))

    def remove(self, layer: int, ids: Tensor) -> None:
        """Delete the rows with these ids."""
        self.inner.remove(layer, ids)

    def snapshot(self) -> QuantizedView:
        """Return a view of the present rows."""
        return QuantizedView(self.coding, self.inner.snapshot())

    def restore(self, snapshot: StoreView) -> None:
        """Go back to a snapshot. Raises MemoryMismatchError when it is of another kind of store or layout."""
        if not isinstance(snapshot, QuantizedView) or snapshot.coding != self.coding:
            raise MemoryMismatchError(
                f"restore takes a snapshot of this store, a quantised one of {self.layout}, "
                f"got a {type(snapshot).__name__} of {getattr(snapshot, 'layout', None)}"
            )
        self.inner.restore(snapshot.inner)

    def fork(self) -> Self:
        """Return a store around a fork of the inner one."""
        return self._around(self.inner.fork(), self.coding)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the same codes elsewhere, or read as another dtype."""
        layout = self.layout.to(device, dtype)
        coding = evolve(
            self.coding,
            layout=layout,
            # Codes were made in the wider dtype of the two, and must read back as they did before.
            arithmetic=torch.promote_types(self.coding.arithmetic, arithmetic_of(layout.dtype)),
        )
        return self._around(self.inner.to(device), coding)

    def _around(self, inner: MemoryStore, coding: Coding) -> Self:
        store = object.__new__(type(self))
        MemoryStore.__init__(store, coding.layout, self.options)
        store.coding = coding
        store._hold(inner)
        return store

    def _hold(self, inner: MemoryStore) -> None:
        self.inner, self.identity = inner, inner.identity


def _exponent(name: str) -> str:
    return f"{name}_exponent"
