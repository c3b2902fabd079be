"""LayeredView: the reading side of stores that keep every layer as a value which never changes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from torch import Tensor

from mplus.stores.base import Column, Content, FoundRows, Location, StoreView

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mplus.rows import MemoryRows


class LayerValue(Protocol):
    """The rows of one layer."""

    def __len__(self) -> int: ...

    @property
    def ids(self) -> Tensor:
        """``[m]`` int64, ascending."""

    def column(self, name: str) -> Tensor | None:
        """Return ``[m, ...]``, one of the columns that the rows have."""

    def gather(self, ids: Tensor, leave_out: Collection[str] = ()) -> MemoryRows:
        """Return copies of the rows with these ids. Raises KeyError naming one that is not there."""

    def find(self, ids: Tensor) -> FoundRows:
        """Return where the rows with these ids lie. Raises KeyError as ``gather``."""

    def locate(self, name: str, ids: Tensor) -> Location:
        """Return where the rows with these ids lie. Raises KeyError as ``gather``."""


L_co = TypeVar("L_co", bound=LayerValue, covariant=True)


class LayeredView(StoreView, Generic[L_co]):
    """Reads one value per layer."""

    @property
    @abstractmethod
    def values(self) -> Sequence[L_co]:
        """The layers as they are at this moment."""

    def ids(self, layer: int) -> Tensor:
        """Return ``[m]`` int64, ascending."""
        return self._layer(layer).ids

    def column(self, layer: int, name: Column) -> Tensor | None:
        """Return one column in the order of ``ids``, without a copy if its rows lie together."""
        return self._layer(layer).column(name) if name in self.layout.columns() else None

    def count(self, layer: int) -> int:
        """Return the number of rows."""
        return len(self._layer(layer))

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        """Return copies of the rows with these ids. Raises KeyError naming a missing one."""
        with naming_layer(layer):
            return self._layer(layer).gather(ids, leave_out)

    def find(self, layer: int, ids: Tensor) -> FoundRows:
        """Return where rows with these ids lie; nothing is copied. Raises KeyError naming a missing one."""
        with naming_layer(layer):
            return self._layer(layer).find(ids)

    def locate(self, layer: int, name: Content, ids: Tensor) -> Location | None:
        """Return where rows with these ids lie; nothing is copied. Raises KeyError naming a missing one."""
        if name not in self.layout.columns():
            return None
        with naming_layer(layer):
            return self._layer(layer).locate(name, ids)

    def _layer(self, layer: int) -> L_co:
        if not 0 <= layer < self.layout.layers:
            raise IndexError(f"layer must be in 0..{self.layout.layers - 1}, got {layer}")
        return self.values[layer]


@contextmanager
def naming_layer(layer: int) -> Iterator[None]:
    """Add the layer to what a KeyError says."""
    try:
        yield
    except KeyError as error:
        raise KeyError(f"{error.args[0]} in layer {layer}") from None
