"""Retriever: which long-term rows a prompt brings back into attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from attrs import define
from torch import Tensor, nn

from mplus.config import JsonValue
from mplus.errors import InputError, MechanismError, NotSupported
from mplus.retrievers.ranking import top_places
from mplus.stores.base import StoreView


@define(frozen=True, kw_only=True)
class RetrieverShape:
    """Sizes that a retriever is built for: ``layers`` that carry memory, and their ``hidden_size`` d."""

    layers: int
    hidden_size: int


@define(frozen=True, eq=False)
class Selection:
    """The rows that one batch row retrieves in one layer: ``ids`` ``[n]`` int64, best first, ``scores`` float32."""

    ids: Tensor
    scores: Tensor


@define(frozen=True)
class Heads:
    """Attention heads of a layer: ``queries`` H and ``keys`` Hkv, their ``width`` D, and the ``scale`` of products."""

    queries: int
    keys: int
    width: int
    scale: float


class Projections(Protocol):
    """A decoder's own attention in the layers that carry memory, for hidden states after the layer's input norm.

    Positions are left out: what is not rotated, or all rotated alike.
    """

    def heads(self, layer: int) -> Heads:
        """Return the heads of a layer. Raises NotSupported when the decoder does not show its queries and keys."""

    def queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[B, n, d]`` to queries ``[B, n, H, D]``."""

    def keys(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[B, n, d]`` to keys ``[B, n, Hkv, D]``."""


class Retriever(nn.Module, ABC):
    """Scores long-term rows against the text and picks the best; trainable parts are its parameters.

    Built as ``Retriever(shape, options)``. Hidden states are those *after the layer's input norm*.
    Reading never changes a store, and equal input gives equal output.

    Attributes:
        name: in configurations.
        key_size: width r of the keys kept with each row; 0 when the retriever needs none.
        transposed_keys: whether it multiplies all keys by one vector, which a CPU does in half the time where keys lie
            in memory as ``[r, m]``. A few keys are slower to gather then.

    Example:
        The newest rows first, whatever the text says:

        >>> from mplus.retrievers import Retriever, RetrieverShape, check_selection, top_k
        >>> class Newest(Retriever):
        ...     name = "newest"
        ...
        ...     def select(self, layer, queries, query_mask, stores, k):
        ...         check_selection(queries, query_mask, stores, k)
        ...         return [top_k(store.column(layer, "birth").float(), store.ids(layer), k) for store in stores]
        >>> retriever = Newest(RetrieverShape(layers=2, hidden_size=8))
        >>> queries = retriever.project_queries(0, torch.ones(1, 3, 8))
        >>> retriever.select(0, queries, torch.ones(1, 3, dtype=torch.bool), [store], 2)[0].ids
        tensor([4, 3])
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the implementation (attrs class; the base class has none)."""

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Return option values that differ from the class's own in this variant of the mechanism."""
            return {}

    name: ClassVar[str]
    key_size: int = 0
    transposed_keys: bool = False

    def __init__(self, shape: RetrieverShape, options: Options | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.options = options if options is not None else self.Options()

    @property
    def query_size(self) -> int:
        """The width of the queries: that of the keys, unless a retriever says otherwise."""
        return self.key_size

    def attach(self, decoder: Projections) -> None:
        """Take what is needed of a decoder that has been wrapped with this retriever; ``key_size`` may change here.

        Raises:
            NotSupported: the retriever needs what this decoder does not give.
        """

    def project_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[B, T, d]`` to queries ``[B, T, query_size]``. A retriever without keys returns width 0."""
        return hidden.new_empty(*hidden.shape[:-1], 0)

    def project_keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Project ``[M, d]`` to keys ``[M, r]``; None when ``key_size`` is 0. Called once a row, when it is stored."""
        return None

    def project_encoder_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Project memory rows ``[B, K, d]`` to queries ``[B, K, r]`` for rows of the same source: for training only.

        Raises:
            NotSupported: the retriever has no such projection.
        """
        raise NotSupported(
            f"the retriever {self.name!r} has no encoder queries: use 'linear' with encoder_queries = true, or set "
            "encoder_weight = 0"
        )

    def score(self, layer: int, queries: Tensor, query_mask: Tensor, keys: Tensor) -> Tensor:
        """Compute the numbers that ``select`` ranks rows by, differentiable and in batches: for training.

        Args:
            layer: index among the layers that carry memory.
            queries: ``[B, T, r]``, or ``[B, R, T, r]`` for R texts against the same rows; of ``project_queries``.
            query_mask: ``[B, T]`` or ``[B, R, T]`` bool, True at text.
            keys: ``[B, m, r]`` of ``project_keys``.

        Returns:
            ``[B, m]`` or ``[B, R, m]`` in float32 or better.

        Raises:
            NotSupported: the retriever has no such score, so it cannot be trained.
        """
        raise NotSupported(
            f"the retriever {self.name!r} does not score rows by queries and keys, so it cannot be trained: "
            "use one that does, such as 'linear'"
        )

    def facts(self) -> dict[str, JsonValue]:
        """Return how keys are compared, as plain data: with its parameters, what a saved memory holds a model to."""
        return {}

    def index_facts(self, layer: int, store: StoreView) -> dict[str, JsonValue]:
        """Describe the index that serves reads of ``layer``, as plain data; {} where every row is looked at."""
        return {}

    def sync_index(self, store: StoreView) -> None:
        """Sync the index of a store, if there is one, with its rows: removed rows leave it."""

    def index_tensors(self, layer: int, store: StoreView) -> dict[str, Tensor]:
        """Return tensors to save with these rows, from which ``load_index`` makes their index again; {}: no index."""
        return {}

    def load_index(self, layer: int, store: StoreView, tensors: Mapping[str, Tensor]) -> None:
        """Make the index from tensors that were saved with these rows.

        Raises:
            InputError: the tensors are not of an index over these rows: leave them, and it is made from the keys.
        """

    @abstractmethod
    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Pick the ``min(k, count)`` best rows of ``layer`` for each batch row.

        Args:
            layer: index among the layers that carry memory.
            queries: ``[B, T, r]`` as returned by ``project_queries``.
            query_mask: ``[B, T]`` bool, True at text and False at padding. A row may not be all False.
            stores: one per batch row; layers without rows are legal.
            k: largest number of rows to return.

        Returns:
            One ``Selection`` per batch row: score descending, ties by lowest id.
        """


def check_selection(queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int) -> None:
    """Raise InputError unless these can be the arguments of ``Retriever.select``."""
    if queries.ndim != 3 or query_mask.shape != queries.shape[:2] or len(stores) != queries.shape[0]:
        raise InputError(
            "queries must be [B, T, r] with a mask [B, T] and B stores, got queries "
            f"{list(queries.shape)}, a mask {list(query_mask.shape)} and {len(stores)} stores"
        )
    if query_mask.dtype != torch.bool:
        raise InputError(f"query_mask must be bool, got {query_mask.dtype}")
    if k < 0:
        raise InputError(f"k must be at least 0, got {k}")
    if not bool(query_mask.any(dim=1).all()):
        rows = (~query_mask.any(dim=1)).nonzero().squeeze(1).tolist()
        raise InputError(f"every batch row must have text to retrieve with, but in rows {rows} all of it is masked")


def check_selected(found: object, retriever: str, stores: Sequence[StoreView], k: int) -> None:
    """Raise MechanismError unless ``Retriever.select`` returned at most ``k`` rows of every store.

    Args:
        found: what it returned.
        retriever: its name, for messages.
        stores: that it was given.
        k: that it was given.
    """
    said = f"the retriever {retriever!r}: select must return a Selection for each of {len(stores)} stores"
    if not isinstance(found, list | tuple) or len(found) != len(stores):
        got = f"{len(found)}" if isinstance(found, list | tuple) else type(found).__name__
        raise MechanismError(f"{said}, got {got}")
    for one in found:
        if not isinstance(one, Selection):
            raise MechanismError(f"{said}, got a {type(one).__name__}")
        if one.ids.ndim != 1 or one.ids.dtype != torch.int64 or len(one.ids) > k or one.scores.shape != one.ids.shape:
            raise MechanismError(
                f"{said} with ids [n] int64 and scores [n], n at most {k}, got ids {list(one.ids.shape)} "
                f"{one.ids.dtype} and scores {list(one.scores.shape)}"
            )


def top_k(scores: Tensor, ids: Tensor, k: int) -> Selection:
    """Select the ``min(k, m)`` best of ``scores`` ``[m]`` float32: descending, ties by lowest position, NaN last."""
    places, best = top_places(scores, k)
    return Selection(ids[places], best)
