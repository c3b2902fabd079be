"""EvictionPolicy: which long-term rows leave when a store is over its capacity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

from attrs import define
from torch import Tensor

from mplus.stores.base import StoreView


class EvictionPolicy(ABC):
    """Chooses rows to remove; built as ``Policy(options)``."""

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the implementation (attrs class; the base class has none)."""

    name: ClassVar[str]

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        """Ids of exactly ``excess`` rows of ``layer`` to remove (``[excess]`` int64, ``0 < excess <= count``)."""


class FifoEviction(EvictionPolicy):
    """Oldest birth first (M+ section 3.2: at capacity the rows of the largest age are dropped); ties by lowest id."""

    name = "fifo"

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        births = cast("Tensor", store.column(layer, "birth"))  # every layout has births
        return store.ids(layer)[births.argsort(stable=True)[:excess]]
