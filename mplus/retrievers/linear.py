"""LinearRetriever: projections of text and rows, trained together with the memory, searched exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import define, field
from torch import Tensor, nn

from mplus.config import JsonValue, flag, one_of, whole
from mplus.retrievers.base import Retriever, RetrieverShape, Selection, check_selection
from mplus.retrievers.candidates import same_store
from mplus.retrievers.many_stores import Searched, best_of_each
from mplus.retrievers.ranking import best_rows
from mplus.retrievers.scores import SCORES, row_scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.stores.base import StoreView

TRANSPOSED = 64
"""Width of keys from which on it pays to keep them transposed."""


class LinearRetriever(Retriever):
    """Scores every row by its key and the text's queries.

    ``q = f_q(h)`` and ``k = f_k(h)`` with two projectors per layer; keys are kept with the rows. Scores are computed
    in float32 whatever the dtype of the projectors and of the keys: in lower precision many of them would be equal.
    """

    @define(frozen=True, kw_only=True)
    class Options(Retriever.Options):
        """Size of the projectors, and what is made of their products.

        Attributes:
            width: r of queries and keys.
            layers: 2 for ``Linear(d, 2r) - SiLU - Linear(2r, r)``, 1 for ``Linear(d, r)``; both without biases.
            score: "mean_dot": ``(mean_i q_i) . k`` over the text's tokens i, one query vector for a text;
                "sigmoid_mean": ``mean_i sigmoid(q_i . k)`` (M+ section 3.2, and all published checkpoints).
            encoder_queries: a third projector, with which rows ask for rows of their own source; trained beside the
                others where a recipe wants it, and not used in reading (released code).
        """

        width: int = field(default=256, validator=whole(1))
        layers: int = field(default=2, validator=one_of(1, 2))
        score: Literal["mean_dot", "sigmoid_mean"] = field(default="mean_dot", validator=one_of(*SCORES))
        encoder_queries: bool = field(default=False, validator=flag)

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Return the one score that the released code knows, in that variant."""
            return {"score": "sigmoid_mean"} if variant == "published" else {}

    options: Options
    name: ClassVar[str] = "linear"

    def __init__(self, shape: RetrieverShape, options: Retriever.Options | None = None) -> None:
        super().__init__(shape, options)
        self.key_size = self.options.width
        self.transposed_keys = self.options.score == "mean_dot" and self.options.width >= TRANSPOSED
        self.query_proj = nn.ModuleList(_projector(shape.hidden_size, self.options) for _ in range(shape.layers))
        self.key_proj = nn.ModuleList(_projector(shape.hidden_size, self.options) for _ in range(shape.layers))
        if self.options.encoder_queries:
            projectors = (_projector(shape.hidden_size, self.options) for _ in range(shape.layers))
            self.encoder_query_proj = nn.ModuleList(projectors)

    def project_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[B, T, d]`` to ``[B, T, r]`` in the dtype of the projectors."""
        return _project(self.query_proj[layer], hidden)

    def project_keys(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[M, d]`` to ``[M, r]`` in the dtype of the projectors."""
        return _project(self.key_proj[layer], hidden)

    def project_encoder_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[B, K, d]`` to ``[B, K, r]``. Raises NotSupported without ``encoder_queries``."""
        if not self.options.encoder_queries:
            return super().project_encoder_queries(layer, hidden)
        return _project(self.encoder_query_proj[layer], hidden)

    def score(self, layer: int, queries: Tensor, query_mask: Tensor, keys: Tensor) -> Tensor:
        """Compute the score of the options; see ``Retriever.score``."""
        return SCORES[self.options.score](queries, query_mask, keys)

    def facts(self) -> dict[str, JsonValue]:
        """Return the score's name."""
        return {"score": self.options.score}

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Pick the ``min(k, count)`` best rows for each batch row; a store given for several rows is read once."""
        check_selection(queries, query_mask, stores, k)
        # All text tokens in one go: a mask for each row takes longer than ranking a small store.
        whole = bool(query_mask.all())
        texts = list(queries) if whole else queries[query_mask].split(query_mask.sum(1).tolist())
        found, several = dict[int, Selection](), dict[int, Searched]()
        for store, rows in same_store(stores):
            if not store.layout.key_size:
                raise ValueError("the linear retriever needs rows with keys; this store was made without (key_size=0)")
            chunks = store.chunks(layer, "key")
            searched = [Searched(texts[row], chunks, store.count(layer)) for row in rows]
            if searched[0].small and (len(rows) == 1 or len(rows) < len(stores)):
                several.update(zip(rows, searched, strict=True))
                continue
            score = row_scorer(self.options.score, [one.text for one in searched])
            for row, best in zip(rows, best_rows(chunks, len(rows), k, score), strict=True):
                found[row] = Selection(*best)
        for row, best in zip(several, best_of_each(list(several.values()), self.options.score, k), strict=True):
            found[row] = Selection(*best)
        return [found[row] for row in range(len(stores))]


def _project(projector: nn.Module, hidden: Tensor) -> Tensor:
    """Project in the retriever's precision, which may be another than the decoder's (a quantised one's, say)."""
    weight = next(projector.parameters())
    return projector(hidden.to(weight.dtype))  # type: ignore[no-any-return]


class Projection(nn.Module):
    """A linear map ``[..., inputs]`` -> ``[..., outputs]`` without bias.

    It is no ``nn.Linear``: what is done to all linear layers of a decoder (PEFT's ``target_modules="all-linear"``,
    say) is not meant for the retriever.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Linear(inputs, outputs, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        return nn.functional.linear(x, self.weight)


def _projector(hidden_size: int, options: LinearRetriever.Options) -> nn.Module:
    if options.layers == 1:
        return Projection(hidden_size, options.width)
    inner = 2 * options.width
    return nn.Sequential(Projection(hidden_size, inner), nn.SiLU(), Projection(inner, options.width))
