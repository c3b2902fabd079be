"""Retriever: which long-term rows a prompt brings back into attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from attrs import define
from torch import Tensor, nn

from mplus.errors import InputError, NotSupported
from mplus.retrievers.ranking import top_places
from mplus.stores.base import StoreView


@define(frozen=True, kw_only=True)
class RetrieverShape:
    """Sizes a retriever is built for: ``layers`` that carry memory, their ``hidden_size`` d."""

    layers: int
    hidden_size: int


@define(frozen=True, eq=False)
class Selection:
    """What one batch row retrieves in one layer: ``ids`` ``[n]`` int64, best first, ``scores`` ``[n]`` float32."""

    ids: Tensor
    scores: Tensor


@define(frozen=True)
class Heads:
    """Attention heads of a layer: H with ``queries``, Hkv with ``keys``, their ``width`` D, ``scale`` of products."""

    queries: int
    keys: int
    width: int
    scale: float


class Projections(Protocol):
    """A decoder's own attention in the layers that carry memory, for hidden states after the layer's input norm.

    Positions are left out: what is not rotated, or all rotated alike.
    """

    def heads(self, layer: int) -> Heads:
        """Sizes. Raises NotSupported when the decoder does not show its queries and keys."""

    def queries(self, layer: int, hidden: Tensor) -> Tensor:
        """``[B, n, d]`` -> ``[B, n, H, D]``."""

    def keys(self, layer: int, hidden: Tensor) -> Tensor:
        """``[B, n, d]`` -> ``[B, n, Hkv, D]``."""


class Retriever(nn.Module, ABC):
    """Scores long-term rows against the text and picks the best; trainable parts are its parameters.

    Built as ``Retriever(shape, options)``. Hidden states are those *after the layer's input norm*.
    Reading never changes a store, and equal input gives equal output.
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the implementation (attrs class; the base class has none)."""

        @classmethod
        def defaults(cls, variant: str) -> dict[str, Any]:
            """Option values that differ from the class's own in this variant of the mechanism."""
            return {}

    name: ClassVar[str]
    key_size: int = 0
    """Width r of the keys kept with each row; 0 when the retriever needs none."""

    def __init__(self, shape: RetrieverShape, options: Any = None) -> None:
        super().__init__()
        self.shape = shape
        self.options = options if options is not None else self.Options()

    @property
    def query_size(self) -> int:
        """Width of the queries, where it is not that of the keys."""
        return self.key_size

    def attach(self, decoder: Projections) -> None:
        """Called once, when a decoder has been wrapped with this retriever; ``key_size`` may change here.

        Raises:
            NotSupported: the retriever needs what this decoder does not give.
        """

    def project_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """``[B, T, d]`` -> queries ``[B, T, query_size]``. A retriever without keys returns width 0."""
        return hidden.new_empty(*hidden.shape[:-1], 0)

    def project_keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """``[M, d]`` -> keys ``[M, r]``, or None when ``key_size`` is 0. Called once, when a row leaves the STM."""
        return None

    def project_encoder_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """``[B, K, d]`` memory rows -> queries ``[B, K, r]`` for rows of the same source: for training only.

        Raises:
            NotSupported: the retriever has no such projection.
        """
        raise NotSupported(
            f"the retriever {self.name!r} has no encoder queries: use 'linear' with encoder_queries = true, or set "
            "encoder_weight = 0"
        )

    def score(self, layer: int, queries: Tensor, query_mask: Tensor, keys: Tensor) -> Tensor:
        """What ``select`` ranks rows by, differentiable and in batches: for training.

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

    def facts(self) -> dict[str, Any]:
        """Facts besides its parameters, as plain data, that a saved memory holds a model to: how keys are compared."""
        return {}

    def index_facts(self, layer: int, store: StoreView) -> dict[str, Any]:
        """Plain facts of the index that a read of ``layer`` is served by; {} where every row is looked at."""
        return {}

    def sync_index(self, store: StoreView) -> None:
        """Bring what is kept of a store's rows, if anything is, up to date: nothing stays of rows that were removed."""

    def index_tensors(self, layer: int, store: StoreView) -> dict[str, Tensor]:
        """What an index over exactly these rows can be made of again, to be saved with them; {} where there is none."""
        return {}

    def load_index(self, layer: int, store: StoreView, tensors: Mapping[str, Tensor]) -> None:
        """Take over an index that was saved with these rows.

        Raises:
            InputError: the tensors are not of an index over these rows: leave them, and it is made from the keys.
        """

    @abstractmethod
    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """The ``min(k, count)`` best rows of ``layer`` for each batch row.

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


def top_k(scores: Tensor, ids: Tensor, k: int) -> Selection:
    """The ``min(k, m)`` best of ``scores`` ``[m]`` (float32): score descending, ties by lowest position, NaN last."""
    places, best = top_places(scores, k)
    return Selection(ids[places], best)
