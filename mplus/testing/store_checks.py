"""Comparing what a ``MemoryStore`` has with the rows that were given to it."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import Column, Content, StoreView
from mplus.testing.strategies import draw_rows

COLUMNS: tuple[Column, ...] = ("birth", "source", "key", "expiry")
CONTENT: tuple[Content, ...] = ("hidden", "projected")


class StoreChecks:
    """The comparisons of ``StoreConformance``, for tests of its subclasses, too.

    Attributes:
        hidden_tolerance, key_tolerance: largest absolute error of values of size about 1, for stores that compress.
    """

    hidden_tolerance: ClassVar[float] = 0.0
    key_tolerance: ClassVar[float] = 0.0

    def expected(self, rows: MemoryRows) -> MemoryRows:
        """What these rows read back as; stores that compress say here what they make of them."""
        return rows

    def check_column(self, name: str, actual: Tensor | None, expected: Tensor | None) -> None:
        """Raise AssertionError unless a column is what was stored, within the tolerances."""
        if expected is None:
            assert actual is None, f"a layout without {name!r} has no such column"
            return
        assert actual is not None, f"column {name!r} is missing"
        tolerance = {"hidden": self.hidden_tolerance, "key": self.key_tolerance}.get(name, 0.0)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, msg=lambda m: f"column {name!r}: {m}")

    def check_rows(self, actual: MemoryRows, expected: MemoryRows) -> None:
        """Raise AssertionError unless ``actual`` are what ``expected`` reads back as, within the tolerances."""
        self._compare(actual, self.expected(expected))

    def _compare(self, actual: MemoryRows, expected: MemoryRows) -> None:
        found, wanted = actual.columns(), expected.columns()
        for name in ("hidden", "projected", *COLUMNS, *expected.extra, *actual.extra):
            self.check_column(name, found.get(name), wanted.get(name))

    def check_layer(self, view: StoreView, layer: int, expected: list[tuple[int, MemoryRows]]) -> None:
        """Raise AssertionError unless a layer holds exactly these rows under these ids, in this order."""
        ids = view.ids(layer)
        assert ids.dtype == torch.int64
        assert ids.tolist() == [row_id for row_id, _ in expected]
        assert view.count(layer) == len(expected)
        empty = draw_rows(view.layout, 0, 0)
        rows = self.expected(MemoryRows.cat([empty, *(row for _, row in expected)]))
        for name in cast("tuple[Column, ...]", (*COLUMNS, *rows.extra)):
            self.check_column(name, view.column(layer, name), rows.columns().get(name))
        self.check_column("key", view.keys(layer), rows.key)
        self._compare(view.gather(layer, ids), rows)
        self.check_pieces(view, layer, ids, rows)

    def check_pieces(self, view: StoreView, layer: int, ids: Tensor, rows: MemoryRows) -> None:
        """Raise AssertionError unless chunks hold these rows under these ids."""
        names = tuple(rows.columns())
        parts: dict[str, list[Tensor]] = {"id": [], **{name: [] for name in names}}
        newest = -1
        for chunk in view.chunks(layer, *cast("Any", names)):
            every = chunk.ids.tolist()
            assert every == sorted(set(every)), "ids of a chunk ascend"
            assert not every or every[0] > newest, "ids ascend from chunk to chunk"
            newest = every[-1] if every else newest
            for name, column in {"id": chunk.ids, **chunk.columns}.items():
                parts[name].append(column if chunk.live is None else column[chunk.live])
        assert [row_id for part in parts.pop("id") for row_id in part.tolist()] == ids.tolist()
        for name, found in parts.items():
            self.check_column(name, torch.cat(found) if found else rows.columns()[name][:0], rows.columns()[name])

    def check_located(self, view: StoreView, layer: int, ids: Tensor, rows: MemoryRows) -> None:
        """Raise AssertionError unless content that is found where it lies is that of these rows."""
        for name in CONTENT:
            located = view.locate(layer, name, ids) if len(ids) and name in rows.columns() else None
            if located is not None:
                column, places = located.contiguous()
                self.check_column(name, column[places], rows.columns()[name])

    def check_all(self, view: StoreView, expected: MemoryRows, ids: Tensor, layer: int = 0) -> None:
        """As ``check_layer``, from rows and ids."""
        single = [expected.select(slice(place, place + 1)) for place in range(len(expected))]
        self.check_layer(view, layer, list(zip(ids.tolist(), single, strict=True)))
