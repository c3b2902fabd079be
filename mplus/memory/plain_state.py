"""The states of memories on disk, found by the name of their mechanism; also where that is not installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import DuplicateNameError, MissingDependencyError, NotSupported, PluginError, UnknownNameError
from mplus.mechanisms import MECHANISMS
from mplus.memory.state import StreamState
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout


@define(frozen=True, eq=False, kw_only=True)
class PlainState(StreamState):
    """What a file holds of a stream whose mechanism is not installed: rows and tensors by name, as they are.

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
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor], **others: Any
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


def state_class(mechanism: str) -> type[StreamState]:
    """Return the class of the states of a mechanism; ``PlainState`` where it is not installed, or broken."""
    try:
        found: type[StreamState] = MECHANISMS.get(mechanism).State
    except (UnknownNameError, DuplicateNameError, PluginError, MissingDependencyError):
        return PlainState
    return found
