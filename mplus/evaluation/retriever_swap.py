"""Retrievers that stand in for a decoder's own, and the ways of reading memories that the arms are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from attrs import define, field
from torch import Tensor, nn

from mplus.config import JsonValue, options_of
from mplus.errors import (
    DuplicateNameError,
    InputError,
    MissingDependencyError,
    NotSupported,
    PluginError,
    UnknownNameError,
)
from mplus.evaluation.options import ArmOptions
from mplus.hf.model.model_class import MemoryModel
from mplus.memory.memory import Memory
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.base import Retriever, RetrieverShape, Selection, check_selection, top_k
from mplus.rows import MemoryRows
from mplus.stores.base import Column, Content, StoreView


def own_retriever(model: MemoryModel) -> Retriever:
    """Return the retriever of a decoder's mechanism. Raises NotSupported where it has none."""
    mechanism = model.mplus_engine.mechanism
    if mechanism.retriever is None:
        raise NotSupported(f"the mechanism {mechanism.name!r} has no retriever that another one could stand in for")
    return mechanism.retriever


def retriever_for(model: MemoryModel, name: str, **options: JsonValue) -> Retriever:
    """Make a retriever for a wrapped decoder, to read rows that were written without it.

    Raises:
        UnknownNameError, MissingDependencyError, PluginError: see ``Registry.get``.
        ConfigError: an option that it does not have.
        NotSupported: the decoder's mechanism has no retriever in whose place it could read, or it needs something of
            the decoder or of the rows that there is not.
    """
    engine = model.mplus_engine
    own_retriever(model)  # or there is none in whose place it could read
    shape = RetrieverShape(layers=engine.shape.layers, hidden_size=engine.shape.width)
    cls = RETRIEVERS.get(name)
    retriever = cls(shape, options_of(cls, options)).to(device=engine.device, dtype=engine.dtype)
    engine.attach(retriever)
    norms = [spec.norm for spec in engine.retrofit.anatomy.specs]
    return Rekeyed(retriever, norms) if retriever.key_size else retriever


def check_new_memories(model: MemoryModel, retriever: Retriever) -> None:
    """Raise NotSupported unless a retriever made for this decoder can search the rows of its new memories."""
    if isinstance(retriever, Rekeyed) and model.mplus_engine.memory_rows == "projected":
        raise NotSupported(
            f"the retriever {retriever.inner.name!r} makes keys of its own from hidden states, and rows of this "
            "decoder's memories are kept as keys and values only: wrap it with memory_rows='both' or 'hidden'"
        )


def with_own_parameters(model: MemoryModel, name: str, **options: JsonValue) -> Retriever:
    """Make a retriever for a wrapped decoder, with the parameters of the decoder's own where it can take them.

    Then it reads the keys that rows were written with: "centroid" or "faiss_ivf" where the decoder has "linear".
    Options that both have are those of the decoder's own unless given. Otherwise as ``retriever_for``.

    Raises:
        As ``retriever_for``.
    """
    engine = model.mplus_engine
    own, cls = engine.mechanism.retriever, RETRIEVERS.get(name)
    state = {} if own is None else own.state_dict()
    if own is None or not state:
        return retriever_for(model, name, **options)
    known = {attribute.name for attribute in attrs.fields(cls.Options)}
    same = {key: value for key, value in attrs.asdict(own.options).items() if key in known}
    retriever = cls(own.shape, options_of(cls, {**same, **options})).to(device=engine.device, dtype=engine.dtype)
    if _shapes(retriever.state_dict()) != _shapes(state):
        return retriever_for(model, name, **options)
    retriever.load_state_dict(state)
    retriever.requires_grad_(False)
    engine.attach(retriever)
    return retriever.train(own.training)


def usable(model: MemoryModel) -> dict[str, Retriever]:
    """Make one of every registered retriever that can read this decoder's memories, its own name left out.

    Left out too: what needs a package that is not installed, what is broken, what this decoder does not give enough
    for, and what would have to be trained first.
    """
    own = model.mplus_engine.mechanism.retriever
    found: dict[str, Retriever] = {}
    for name in RETRIEVERS.names() if model.mplus_engine.mechanism.uses_retriever else ():
        if own is not None and name == own.name:
            continue
        try:
            retriever = with_own_parameters(model, name)
            check_new_memories(model, retriever)
        except (MissingDependencyError, PluginError, DuplicateNameError, NotSupported):
            continue
        if not isinstance(retriever, Rekeyed) or not retriever.inner.state_dict():
            found[name] = retriever
    return found


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


class Recency(Retriever):
    """Brings back the newest rows, whatever the text says."""

    name: ClassVar[str] = "recency"

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Return the ``min(k, count)`` newest rows of ``layer``; the scores are their births."""
        check_selection(queries, query_mask, stores, k)
        found = []
        for store in stores:
            births = store.column(layer, "birth")
            if births is None:
                raise InputError(f"rows must carry their birth to be ranked by it, layer {layer} has none")
            found.append(top_k(births.float(), store.ids(layer), k))
        return found


class Rekeyed(Retriever):
    """Lets a retriever search rows whose keys another one made: it makes its own, anew at every read.

    Args:
        inner: the retriever.
        norms: the input norm of each layer that carries memory, or None where it has none.
    """

    name: ClassVar[str] = "rekeyed"

    def __init__(self, inner: Retriever, norms: Sequence[nn.Module | None]) -> None:
        super().__init__(inner.shape)
        self.inner = inner
        self._norms = tuple(norms)  # no list of modules: they are the decoder's
        self.key_size = inner.key_size

    @property
    def query_size(self) -> int:
        """Return what ``inner`` returns."""
        return self.inner.query_size

    def project_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what ``inner`` returns."""
        return self.inner.project_queries(layer, hidden)

    def project_keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what ``inner`` returns."""
        return self.inner.project_keys(layer, hidden)

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Select as ``inner``; a store given for several rows is given on as one, so that it is read once."""
        views: dict[int, StoreView] = {}
        for store in stores:
            views.setdefault(id(store), _Keyed(store, self._keys))
        return self.inner.select(layer, queries, query_mask, [views[id(store)] for store in stores], k)

    def _keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        norm = self._norms[layer]
        return self.inner.project_keys(layer, hidden if norm is None else norm(hidden))


@define(eq=False)
class _Keyed(StoreView):
    """A store with the keys of another retriever."""

    store: StoreView
    keys_of: Callable[[int, Tensor], Tensor | None]
    made: dict[int, Tensor | None] = field(factory=dict)

    @property
    def layout(self):  # type: ignore[no-untyped-def, override]
        """Return the layout of the store."""
        return self.store.layout

    def ids(self, layer: int) -> Tensor:
        return self.store.ids(layer)

    def column(self, layer: int, name: Column) -> Tensor | None:
        if name != "key":
            return self.store.column(layer, name)
        if layer not in self.made:
            hidden = self.store.gather(layer, self.store.ids(layer)).need_hidden()
            self.made[layer] = self.keys_of(layer, hidden)
        return self.made[layer]

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        rows = self.store.gather(layer, ids, leave_out)
        keys = None if "key" in leave_out else self.column(layer, "key")
        if keys is None:
            return rows.replace(key=None)
        return rows.replace(key=keys[torch.searchsorted(self.ids(layer), ids)])


@define(frozen=True, eq=False)
class Way:
    """A way of reading memory.

    Attributes:
        retriever: stands in for the decoder's own; None: the decoder's own.
        retrieved_tokens: K0; None: as configured; 0: short-term memory only (MemoryLLM).
        oracle: bring back the rows that were written from the passages with the answer.
    """

    retriever: Retriever | None = None
    retrieved_tokens: int | None = None
    oracle: bool = False


def find_way(model: MemoryModel, arm: str, options: ArmOptions) -> Way | str:
    """Return the way in which an arm reads memories of M+ or MemoryLLM, or the reason why it cannot."""
    mechanism = model.mplus_engine.mechanism
    retrieves = mechanism.uses_retriever and mechanism.config.long_term_tokens != 0
    if arm == "memoryllm":
        return Way(retrieved_tokens=0 if retrieves else None)
    if not retrieves:
        return "the decoder was wrapped without long-term memory"
    if arm == "mplus":
        return Way()
    if arm == "mplus-oracle":
        return Way(oracle=True)
    if arm == "mplus-recency":
        return Way(Recency(own_retriever(model).shape))
    settings = {"seed": options.seed} if arm == "mplus-random" else {}
    try:
        retriever = retriever_for(model, arm.removeprefix("mplus-"), **settings)
        check_new_memories(model, retriever)
        return Way(retriever)
    except (NotSupported, UnknownNameError, MissingDependencyError) as error:
        return str(error)


def state_bytes(streams: Memory, row: int, way: Way) -> int:
    """Return the bytes that a stream keeps to be read this way: rows, keys and tables, room for more included."""
    view, store = streams.snapshot()[row], streams.stores[row]
    if way.retrieved_tokens == 0:  # what it never reads, it would not keep
        mechanism = streams.engine.mechanism
        standing = [mechanism.standing(view, layer) for layer in range(store.layout.layers)]
        return sum(rows.nbytes for rows in standing if rows is not None)
    return int(view.state.nbytes + store.nbytes)
