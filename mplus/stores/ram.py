"""RamStore: long-term rows in memory, on the CPU or on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from attrs import define, field

from mplus.config import whole
from mplus.errors import ConfigError
from mplus.stores.base import MemoryStore
from mplus.stores.slabs.block import RamAllocator
from mplus.stores.slabs.slab import SlabSizes
from mplus.stores.slabs.store import SlabStore

if TYPE_CHECKING:
    from mplus.stores.base import StoreLayout
    from mplus.stores.slabs.block import Allocator


def _above_one(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value < float("inf"):
        raise ConfigError(f"{attribute.name} must be a finite number above 1, got {value!r}")


class RamStore(SlabStore):
    """Rows in memory; see ``SlabStore``."""

    @define(frozen=True, kw_only=True)
    class Options(MemoryStore.Options):
        """How much room is kept.

        Attributes:
            growth: factor by which a layer's room grows, up to ``slab_rows`` at a time. A layer takes at most the
                square of this many times the room of its rows (and ``slab_rows / 16`` more where it is large).
            slab_rows: rows of a block, at most.
            expected_rows: rows a layer is expected to hold: the first block of each has room for them, up to
                ``slab_rows``. 0: room grows with what is written.
        """

        growth: float = field(default=2.0, validator=_above_one)
        slab_rows: int = field(default=16384, validator=whole(1))
        expected_rows: int = field(default=0, validator=whole(0))

    options: Options
    name: ClassVar[str] = "ram"

    @property
    def sizes(self) -> SlabSizes:
        """As the options say."""
        return SlabSizes(self.options.growth, self.options.slab_rows, self.options.expected_rows)

    def allocator(self, layout: StoreLayout, layer: int) -> Allocator:
        """Memory on the device of ``layout``."""
        return RamAllocator(layout)
