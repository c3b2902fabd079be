"""RandomRetriever: rows drawn at random, the baseline that every retriever has to beat."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import whole
from mplus.retrievers.base import Retriever, Selection, check_selection, top_k

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.stores.base import StoreView


class RandomRetriever(Retriever):
    """Uniform draws without replacement that ignore the text.

    The draw depends on the seed, the layer, the number of rows and the birth of the last one only: equal rows give
    equal picks, on every device and after a reload that gave them other ids, and the next write gives others.
    """

    @define(frozen=True, kw_only=True)
    class Options(Retriever.Options):
        """``seed``: stores of equal content give other picks under another seed."""

        seed: int = field(default=0, validator=whole(0))

    options: Options
    name: ClassVar[str] = "random"

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Pick ``min(k, count)`` random rows for each batch row; the scores are the numbers drawn."""
        check_selection(queries, query_mask, stores, k)
        return [self._draw(layer, store, k) for store in stores]

    def _draw(self, layer: int, store: StoreView, k: int) -> Selection:
        ids = store.ids(layer)
        count = ids.shape[0]
        births = store.column(layer, "birth")
        last = int(births[-1]) if births is not None and count else -1
        digest = hashlib.blake2b(repr((self.options.seed, layer, count, last)).encode(), digest_size=8).digest()
        # One bit fewer than the digest has: seeds are signed numbers.
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return top_k(torch.rand(count, generator=generator).to(ids.device), ids, k)
