"""The oracle: retrieval that knows which source the answer is in; the ceiling of what a retriever can do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.errors import InputError
from mplus.mechanisms.base import Retrieved
from mplus.mechanisms.mplus import MPlusMechanism
from mplus.memory.state import StreamView
from mplus.stores.base import StoreView


class OracleMechanism(MPlusMechanism):
    """Brings back the rows written from ``wanted`` sources, then others at random, as many as a read asks for.

    Args:
        config, additions, options: of the mechanism it stands in for.
        wanted: per batch row, the names of the sources.
    """

    def __init__(self, config: Any, additions: Any, options: Any, *, wanted: Sequence[Collection[str]]) -> None:
        super().__init__(config, additions, options)
        self.wanted = wanted

    def retrieve(self, layer: int, hidden: Tensor, mask: Tensor, views: Sequence[StreamView]) -> list[Retrieved | None]:
        if len(views) != len(self.wanted):
            raise InputError(f"the oracle needs labels for every batch row, got {len(self.wanted)} for {len(views)}")
        k = self.config.retrieved_tokens
        if self.config.long_term_tokens == 0 or k == 0:
            return [None] * len(views)
        found: list[Retrieved | None] = []
        for view, names in zip(views, self.wanted, strict=True):
            store = self.searched(view, layer)
            count = store.count(layer)
            if not count:
                found.append(None)
                continue
            useful = written_from(view, store, layer, names)
            generator = torch.Generator().manual_seed(layer * 1_000_003 + count)
            scores = useful + torch.rand(count, generator=generator).to(useful.device) / 2
            best = scores.topk(min(k, count))
            by_id = best.indices.sort()
            ids = store.ids(layer)[by_id.values]
            found.append(self._in_order(store, layer, ids, best.values[by_id.indices]))
        return found


def written_from(view: StreamView, store: StoreView, layer: int, names: Collection[str]) -> Tensor:
    """Return ``[m]`` float32: 1 at the long-term rows of a layer that were written from sources ``names``."""
    numbers = [number for number, source in view.state.sources.items() if source.name in names]
    column = store.column(layer, "source")
    if column is None:
        raise InputError("rows must say which source they were written from, these do not")
    return torch.isin(column, torch.tensor(numbers, dtype=column.dtype, device=column.device)).float()
