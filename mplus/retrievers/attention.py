"""AttentionRetriever: rows ranked by the attention that the layer itself pays to them; nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mplus.config import JsonValue
from mplus.errors import NotSupported
from mplus.retrievers.base import Heads, Projections, Retriever, RetrieverShape, Selection, check_selection, top_k
from mplus.retrievers.scores import piece_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.stores.base import StoreView


class AttentionRetriever(Retriever):
    """Scores a row by its share of the layer's own attention, positions and everything but the rows left out.

    For every head and every token of the text, the softmax over all long-term rows of the scaled products of the
    layer's queries and keys, in float32; a row's score is the mean over heads and tokens, so that the scores of all
    rows add up to 1. Queries and keys are not rotated: a row is to be found wherever it would stand.

    M+ compares its retriever with keeping keys and values in long-term memory and picking the rows with the highest
    attention score for each head (figure 5; no more is said). Rows are hidden states here, which all heads of a layer
    read, so the heads decide together. Sinks and caps of scores are left out.

    Keys are those of the layer, of all its key heads: wider than what a trained retriever keeps.
    """

    name: ClassVar[str] = "attention"

    def __init__(self, shape: RetrieverShape, options: Retriever.Options | None = None) -> None:
        super().__init__(shape, options)
        self._decoder: Projections | None = None
        self._heads: tuple[Heads, ...] = ()

    def attach(self, decoder: Projections) -> None:
        """Take queries and keys from ``decoder``. Raises NotSupported where it does not give them away."""
        self._heads = tuple(decoder.heads(layer) for layer in range(self.shape.layers))
        self._decoder = decoder
        self.key_size = max(heads.keys * heads.width for heads in self._heads)

    @property
    def query_size(self) -> int:
        """The width of the widest layer's queries."""
        return max((heads.queries * heads.width for heads in self._heads), default=0)

    def project_queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[B, T, d]`` to scaled queries of all heads ``[B, T, query_size]``, zeros behind narrower ones."""
        queries = self._bound.queries(layer, hidden) * self._heads[layer].scale
        return pad(queries.flatten(-2), (0, self.query_size - queries[0, 0].numel()))

    def project_keys(self, layer: int, hidden: Tensor) -> Tensor:
        """Project ``[M, d]`` to keys of all key heads ``[M, key_size]``, with zeros behind narrower ones."""
        if not len(hidden):
            return hidden.new_empty(0, self.key_size)
        keys = self._bound.keys(layer, hidden[None])[0]
        return pad(keys.flatten(-2), (0, self.key_size - keys[0].numel()))

    def facts(self) -> dict[str, JsonValue]:
        """Return where the keys come from."""
        return {"keys": "of the layer's attention, not rotated"}

    def score(self, layer: int, queries: Tensor, query_mask: Tensor, keys: Tensor) -> Tensor:
        """Compute ``Retriever.score``; the softmax is over the ``m`` rows given."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        each = queries.ndim == keys.ndim + 1
        with torch.autocast(queries.device.type, enabled=False):
            text = queries.to(dtype).masked_fill(~query_mask[..., None], 0.0)
            text, mask = (text, query_mask) if each else (text[:, None], query_mask[:, None])
            heads = self._heads[layer]
            q = self._split(layer, text)  # [B, R, T, Hkv, G, D]
            k = keys.to(dtype)[..., : heads.keys * heads.width]
            k = k.reshape(*keys.shape[:-1], heads.keys, heads.width)
            shares = torch.einsum("brthgd,bmhd->brthgm", q, k).softmax(-1).mean((3, 4))
            shares = shares.masked_fill(~mask[..., None], 0.0)
            found = shares.sum(2) / mask.sum(-1, keepdim=True).clamp(min=1)
        return found if each else found[:, 0]

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Pick the ``min(k, count)`` rows with the largest share for each batch row; a store is read once."""
        check_selection(queries, query_mask, stores, k)
        distinct = {id(store): store for store in stores}
        read = {key: (store.ids(layer), store.keys(layer)) for key, store in distinct.items()}
        found = []
        for text, mask, store in zip(queries, query_mask, stores, strict=True):
            ids, keys = read[id(store)]
            if keys is None:
                raise ValueError("the attention retriever needs rows with keys; this store was made without")
            found.append(top_k(self._shares(layer, text[mask], keys).to(ids.device), ids, k))
        return found

    @torch.no_grad()
    def _shares(self, layer: int, text: Tensor, keys: Tensor) -> Tensor:
        """Return shares ``[m]`` for a text ``[T, query_size]`` and all rows ``[m, key_size]``, some rows at a time."""
        heads = self._heads[layer]
        queries = self._split(layer, text.float()).permute(1, 0, 2, 3).flatten(1, 2)  # [Hkv, T G, D]
        piece = piece_rows(queries.shape[0] * queries.shape[1], queries.device)
        total = queries.new_full(queries.shape[:2], -torch.inf)
        result = queries.new_empty(keys.shape[0])
        with torch.autocast(queries.device.type, enabled=False):

            def products(part: Tensor) -> Tensor:
                part = part[:, : heads.keys * heads.width].to(queries)
                return queries @ part.reshape(-1, heads.keys, heads.width).permute(1, 2, 0)

            # Twice over all keys, a piece at a time: shares need the sum over all first, and the products of all take
            # too much room.
            for part in keys.split(piece):
                total = torch.logaddexp(total, products(part).logsumexp(-1))
            for number, part in enumerate(keys.split(piece)):
                shares = (products(part) - total[..., None]).exp().mean((0, 1))
                result[number * piece : number * piece + len(part)] = shares
        return result

    def _split(self, layer: int, queries: Tensor) -> Tensor:
        """Split ``[..., query_size]`` into ``[..., Hkv, G, D]``: the G heads that share each key head."""
        heads = self._heads[layer]
        shape = (*queries.shape[:-1], heads.keys, heads.queries // heads.keys, heads.width)
        return queries[..., : heads.queries * heads.width].reshape(shape)

    @property
    def _bound(self) -> Projections:
        if self._decoder is None:
            raise NotSupported(
                f"the retriever {self.name!r} works with the attention of a decoder: wrap one with it, "
                "or use model.mplus_engine.attach(retriever)"
            )
        return self._decoder
