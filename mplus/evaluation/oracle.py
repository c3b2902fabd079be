"""The oracle: retrieval that knows which source the answer is in; the ceiling of what a retriever can do."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import InputError
from mplus.hf.reading.override import WrappedMechanism
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import Decoder, Text
from mplus.mechanisms.kv.state import KvState
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.mechanisms.root import Mechanism
from mplus.memory.state import StreamView
from mplus.rows import MemoryRows
from mplus.stores.base import Column, Content, Identity, Location, StoreLayout, StoreView


class OracleMechanism(WrappedMechanism):
    """Brings back the rows written from ``wanted`` sources, then others at random, as many as a read asks for.

    Of a mechanism that chooses in ``open``, or token by token, reads are opened as if of all other sources nothing had
    been written.

    Example:
        >>> from functools import partial
        >>> from mplus.hf.reading.override import reading_as
        >>> with torch.no_grad(), reading_as(model, around=partial(OracleMechanism, wanted=[{"s1"}])):
        ...     found = model(input_ids=prompt, memory=memory, output_sources=True).memory_sources
        >>> sources = {row.source for row in found[0][0]}
        >>> "s1" in sources, len(sources)
        (True, 3)

    Args:
        inner: the mechanism it stands in for.
        wanted: per batch row, the names of the sources.
        others: let such a mechanism choose among others, too, as far as there is room; else it
            reads all that is wanted, whatever it would choose.
    """

    def __init__(self, inner: MemoryMechanism, *, wanted: Sequence[Collection[str]], others: bool = True) -> None:
        super().__init__(inner)
        self.wanted, self.others = wanted, others

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Open a read, as ``MemoryMechanism.open``."""
        if chooses_by_itself(self.inner):
            self._check(views)
            rows = self.inner.config.retrieved_tokens if self.others else 0
            views = [holding_only(view, names, rows) for view, names in zip(views, self.wanted, strict=True)]
        if not self.others:
            # All that is left is wanted, whatever a threshold or a number of chunks would leave out.
            views = [
                evolve(view, state=evolve(view.state, reads_all=True)) if isinstance(view.state, KvState) else view
                for view in views
            ]
        return self.inner.open(decoder, views, text)

    def retrieve(self, layer: int, hidden: Tensor, mask: Tensor, views: Sequence[StreamView]) -> list[Retrieved | None]:
        """Return the rows of a layer, as ``MemoryMechanism.retrieve``."""
        self._check(views)
        k = self.inner.config.retrieved_tokens
        if chooses_by_itself(self.inner) or not retrieves(self.inner) or k == 0:
            return [None] * len(views)
        return [self._chosen(view, layer, names, k) for view, names in zip(views, self.wanted, strict=True)]

    def _check(self, views: Sequence[StreamView]) -> None:
        if len(views) != len(self.wanted):
            raise InputError(f"the oracle needs labels for every batch row, got {len(self.wanted)} for {len(views)}")

    def _chosen(self, view: StreamView, layer: int, names: Collection[str], k: int) -> Retrieved | None:
        store = self.inner.searched(view, layer)
        count = store.count(layer)
        if not count:
            return None
        useful = written_from(view, store, layer, names)
        # The same draw for the same rows: a run can be made again.
        generator = torch.Generator().manual_seed(layer * 1_000_003 + count)
        # Useful rows score 1 and more, the others less than a half: these fill up, at random.
        scores = useful + torch.rand(count, generator=generator).to(useful.device) / 2
        best = scores.topk(min(k, count))
        by_id = best.indices.sort()  # rows are read oldest first, whatever they score
        return self.inner.bring_back(store, layer, store.ids(layer)[by_id.values], best.values[by_id.indices])


def chooses_by_itself(mechanism: MemoryMechanism) -> bool:
    """Return whether reads choose, in ``open`` or token by token, among what the views that they are given hold."""
    return mechanism.retrieves_in_open or mechanism.searches_in_passes


def retrieves(mechanism: Mechanism) -> bool:
    """Return whether reads bring rows back: layer by layer, once in ``open``, or token by token."""
    if not isinstance(mechanism, MemoryMechanism):  # one of text
        return False
    by_layer = type(mechanism).retrieve is not MemoryMechanism.retrieve
    return chooses_by_itself(mechanism) or (by_layer and mechanism.long_term)


def written_from(view: StreamView, store: StoreView, layer: int, names: Collection[str]) -> Tensor:
    """Return ``[m]`` float32: 1 at the long-term rows of a layer that were written from sources ``names``."""
    numbers = [number for number, source in view.state.sources.items() if source.name in names]
    return _among(_sources(store, layer), numbers).float()


def holding_only(view: StreamView, names: Collection[str], rows: int) -> StreamView:
    """Return a stream as if of all sources but ``names``, and others drawn at random, nothing had been written.

    Args:
        view: of the stream.
        names: of the sources that stay in any case.
        rows: others stay, too, as long as no more rows than these are left in the first layer.
    """
    held = _sources(view.store, 0)
    known = dict(view.state.sources.items())
    kept = {number for number, source in known.items() if source.name in names}
    left = rows - sum(int((held == number).sum()) for number in kept)
    others = sorted(known.keys() - kept)
    for place in torch.randperm(len(others), generator=torch.Generator().manual_seed(len(held))).tolist():
        size = int((held == others[place]).sum())
        if 0 < size <= left:
            kept.add(others[place])
            left -= size
    state = view.state
    for number in known.keys() - kept:
        state = state.without_source(number)
    return StreamView(state, _Part(view.store, sorted(kept)))


def _among(column: Tensor, numbers: Sequence[int]) -> Tensor:
    return torch.isin(column, torch.tensor(numbers, dtype=column.dtype, device=column.device))


def _sources(store: StoreView, layer: int) -> Tensor:
    column = store.column(layer, "source")
    if column is None:
        raise InputError("rows must say which source they were written from, these do not")
    return column


@define(eq=False)
class _Part(StoreView):
    """The rows of a store that were written from the sources ``numbers``."""

    store: StoreView
    numbers: Sequence[int]
    identity: Identity | None = None
    _live: dict[int, Tensor] = field(factory=dict)

    @property
    def layout(self) -> StoreLayout:  # type: ignore[override]  # an attribute there
        """Return the layout of the store."""
        return self.store.layout

    def ids(self, layer: int) -> Tensor:
        ids = self.store.ids(layer)
        return ids[self._mask(layer).to(ids.device)]

    def column(self, layer: int, name: Column) -> Tensor | None:
        found = self.store.column(layer, name)
        return None if found is None else found[self._mask(layer).to(found.device)]

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        return self.store.gather(layer, ids, leave_out)

    def locate(self, layer: int, name: Content, ids: Tensor) -> Location | None:
        return self.store.locate(layer, name, ids)

    def _mask(self, layer: int) -> Tensor:
        if layer not in self._live:
            self._live[layer] = _among(_sources(self.store, layer), self.numbers)
        return self._live[layer]
