"""LinearRetriever: the retriever that M+ trains together with the memory, searched exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import define, field
from torch import Tensor, nn

from mplus.config import one_of, whole
from mplus.retrievers.base import Retriever, RetrieverShape, Selection, check_selection, top_k

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.stores.base import StoreView

MAX_PRODUCTS = 2**22
"""Largest number of query-key products held at a time (16 MiB in float32)."""


class LinearRetriever(Retriever):
    """Scores a row by ``mean_i sigmoid(q_i . k)`` over the text's queries (M+ section 3.2), for every row.

    ``q = f_q(h)`` and ``k = f_k(h)`` with two projectors per layer; keys are kept with the rows. Scores are computed
    in float32 whatever the dtype of the projectors and of the keys: in lower precision most of them would be equal.
    """

    @define(frozen=True, kw_only=True)
    class Options(Retriever.Options):
        """Size of the projectors.

        Attributes:
            width: r of queries and keys.
            layers: 2 for ``Linear(d, 2r) - SiLU - Linear(2r, r)``, 1 for ``Linear(d, r)``; both without biases.
        """

        width: int = field(default=256, validator=whole(1))
        layers: int = field(default=2, validator=one_of(1, 2))

    options: Options
    name: ClassVar[str] = "linear"

    def __init__(self, shape: RetrieverShape, options: Any = None) -> None:
        super().__init__(shape, options)
        self.key_size = self.options.width
        self.query_proj = nn.ModuleList(_projector(shape.hidden_size, self.options) for _ in range(shape.layers))
        self.key_proj = nn.ModuleList(_projector(shape.hidden_size, self.options) for _ in range(shape.layers))

    def project_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """``[B, T, d]`` -> ``[B, T, r]`` in the dtype of the projectors."""
        return _project(self.query_proj[layer], hidden)

    def project_keys(self, layer: int, hidden: Tensor) -> Tensor:
        """``[M, d]`` -> ``[M, r]`` in the dtype of the projectors."""
        return _project(self.key_proj[layer], hidden)

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """The ``min(k, count)`` best rows for each batch row; a store given for several rows is read once."""
        check_selection(queries, query_mask, stores, k)
        shared: dict[int, list[int]] = {}
        for row, store in enumerate(stores):
            shared.setdefault(id(store), []).append(row)
        found: dict[int, Selection] = {}
        for rows in shared.values():
            store = stores[rows[0]]
            ids, keys = store.ids(layer), store.keys(layer)
            if keys is None:
                raise ValueError("the linear retriever needs rows with keys; this store was made without (key_size=0)")
            scores = mean_sigmoid([queries[row][query_mask[row]] for row in rows], keys)
            for row, score in zip(rows, scores, strict=True):
                found[row] = top_k(score.to(ids.device), ids, k)
        return [found[row] for row in range(len(stores))]


@torch.no_grad()
def mean_sigmoid(queries: Sequence[Tensor], keys: Tensor) -> list[Tensor]:
    """``mean_i sigmoid(q_i . k_j)`` for each of several texts, in float32 and without autograd.

    Args:
        queries: per text ``[T, r]`` with T of at least 1.
        keys: ``[M, r]`` on any device and in any dtype; moved to the queries and upcast in pieces.

    Returns:
        Per text ``[M]`` float32.
    """
    device = queries[0].device
    piece = max(1, MAX_PRODUCTS // max(text.shape[0] for text in queries))
    # Autocast would take the products back to half precision.
    with torch.autocast(device.type, enabled=False):
        texts = [text.float() for text in queries]
        scores = [torch.empty(keys.shape[0], device=device) for _ in texts]
        for start in range(0, keys.shape[0], piece):
            part = keys[start : start + piece].to(device=device, dtype=torch.float32).T
            for text, score in zip(texts, scores, strict=True):
                score[start : start + piece] = (text @ part).sigmoid_().mean(0)
    return scores


def _project(projector: nn.Module, hidden: Tensor) -> Tensor:
    """A decoder in another precision than its retriever (a quantised one, say) is legal."""
    weight = next(projector.parameters())
    return projector(hidden.to(weight.dtype))  # type: ignore[no-any-return]


def _projector(hidden_size: int, options: LinearRetriever.Options) -> nn.Module:
    if options.layers == 1:
        return nn.Linear(hidden_size, options.width, bias=False)
    inner = 2 * options.width
    return nn.Sequential(
        nn.Linear(hidden_size, inner, bias=False), nn.SiLU(), nn.Linear(inner, options.width, bias=False)
    )
