"""Memory rows: the latent tokens of one layer, with the facts that travel with each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError

NO_SOURCE = -1
"""Source number of rows that came with a checkpoint and were never written from a text."""

OWN_COLUMNS = frozenset({"hidden", "birth", "source", "key", "expiry", "projected"})


@define(frozen=True, eq=False)
class MemoryRows:
    """n rows of one layer, in order. All columns have length n; columns are never modified in place.

    Example:
        >>> import torch
        >>> births, sources = torch.arange(3), torch.tensor([0, 0, 1])
        >>> rows = MemoryRows(hidden=torch.randn(3, 8), birth=births, source=sources)
        >>> of_the_first_text = rows.select(rows.source == 0)
        >>> len(of_the_first_text), sorted(of_the_first_text.columns())
        (2, ['birth', 'hidden', 'source'])

    Attributes:
        hidden: ``[n, d]`` float, or None where they are not kept. Input-side hidden states: what a layer's norm, key
            and value projections read.
        birth: ``[n]`` int64. Immutable position in the order of writing; age = clock - 1 - birth.
        source: ``[n]`` int64. Number of the source the row was written from, or ``NO_SOURCE``.
        key: ``[n, r]`` float, or None where no retriever keys are kept.
        expiry: ``[n]`` float64, or None. Merge count at which the row expires (eviction by time to live).
        projected: ``[n, Hkv (D + Dv)]`` float, or None where they are not kept. The layer's keys of the row, not
            rotated, and behind them its values, as the reading adapter makes them.
        extra: further columns by name: of a mechanism whose layout has some, or of a store that keeps rows in a form
            of its own.
    """

    hidden: Tensor | None
    birth: Tensor
    source: Tensor
    key: Tensor | None = None
    expiry: Tensor | None = None
    projected: Tensor | None = None
    extra: Mapping[str, Tensor] = field(factory=dict)

    @staticmethod
    def of(columns: Mapping[str, Tensor]) -> MemoryRows:
        """Return rows with just these columns."""
        given = columns.get
        return MemoryRows(
            given("hidden"),
            columns["birth"],
            columns["source"],
            given("key"),
            given("expiry"),
            given("projected"),
            {name: columns[name] for name in columns if name not in OWN_COLUMNS},
        )

    def need_hidden(self) -> Tensor:
        """Return ``hidden``. Raises MemoryMismatchError where it is not kept."""
        if self.hidden is None:
            raise MemoryMismatchError(
                "these rows have no hidden states, only keys and values: make the memory with memory_rows='both' or "
                "'hidden'"
            )
        return self.hidden

    def __len__(self) -> int:
        return self.birth.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by all columns."""
        return sum(t.numel() * t.element_size() for t in self.columns().values())

    def columns(self) -> dict[str, Tensor]:
        """Return the columns that are present, by name."""
        named = {
            "hidden": self.hidden,
            "birth": self.birth,
            "source": self.source,
            "key": self.key,
            "expiry": self.expiry,
            "projected": self.projected,
            **self.extra,
        }
        return {name: column for name, column in named.items() if column is not None}

    def select(self, index: Tensor | slice) -> MemoryRows:
        """Return the rows at ``index`` (int64 positions, bool mask or slice), in that order."""
        if isinstance(index, slice):
            return self._each(lambda column: column[index])
        index = index.to(self.birth.device)
        positions = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        # Not column[positions]: on a CPU that is several times slower for wide rows.
        return self._each(lambda column: column.index_select(0, positions))

    def replace(self, **columns: Tensor | None) -> MemoryRows:
        """Return the same rows with some columns exchanged."""
        return evolve(self, **cast("dict[str, Any]", columns))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryRows:
        """Move every column to ``device``; cast the floating ones that hold content to ``dtype``."""
        moved = self._each(lambda column: column.to(device))
        columns = moved.columns()
        content = [name for name in ("hidden", "key", "projected") if name in columns and dtype is not None]
        return moved.replace(**{name: columns[name].to(dtype) for name in content})

    def _each(self, change: Callable[[Tensor], Tensor]) -> MemoryRows:
        """Return rows with ``change(column)`` in the place of every column."""

        def of(column: Tensor | None) -> Tensor | None:
            return None if column is None else change(column)

        return MemoryRows(
            of(self.hidden),
            change(self.birth),
            change(self.source),
            of(self.key),
            of(self.expiry),
            of(self.projected),
            {name: change(column) for name, column in self.extra.items()},
        )

    @staticmethod
    def cat(parts: Sequence[MemoryRows]) -> MemoryRows:
        """Return all rows of ``parts``, in order. Raises ValueError when their columns differ."""
        columns = [part.columns() for part in parts]
        names = columns[0].keys()
        for other in columns[1:]:
            if other.keys() != names:
                raise ValueError(f"rows to join must have the same columns, got {sorted(names)} and {sorted(other)}")
        return MemoryRows.of({name: torch.cat([part[name] for part in columns]) for name in names})

    @staticmethod
    def empty(
        hidden_size: int,
        *,
        key_size: int = 0,
        expiry: bool = False,
        projected_size: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> MemoryRows:
        """Return no rows, with the columns asked for (a size of 0: no such column)."""
        return MemoryRows(
            hidden=torch.empty(0, hidden_size, dtype=dtype, device=device) if hidden_size else None,
            birth=torch.empty(0, dtype=torch.int64, device=device),
            source=torch.empty(0, dtype=torch.int64, device=device),
            key=torch.empty(0, key_size, dtype=dtype, device=device) if key_size else None,
            expiry=torch.empty(0, dtype=torch.float64, device=device) if expiry else None,
            projected=torch.empty(0, projected_size, dtype=dtype, device=device) if projected_size else None,
        )
