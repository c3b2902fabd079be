"""IndexedMechanism: a mechanism whose rows a retriever may bring back, and what that one keeps of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from mplus.errors import InputError
from mplus.mechanisms.root import Mechanism
from mplus.retrievers.base import Retriever
from mplus.stores.base import MemoryStore, StoreView

logger = logging.getLogger(__name__)


class IndexedMechanism(Mechanism):
    """The rules of one memory of rows, with a retriever or without.

    Attributes:
        retriever: the module of that name among the mechanism's own, if there is one, which brings rows back.
    """

    retriever: Retriever | None

    def sync_index(self, store: MemoryStore) -> None:
        """Rows were removed from ``store`` for good: let go of what a retriever keeps of them."""
        if self.retriever is not None:
            self.retriever.sync_index(store)

    def index_tensors(self, store: StoreView) -> list[dict[str, Tensor]]:
        """Per layer, what the retriever's index of these rows can be made of again; {} where there is none."""
        retriever, layers = self.retriever, range(store.layout.layers)
        return [{} if retriever is None else retriever.index_tensors(layer, store) for layer in layers]

    def load_index(self, store: StoreView, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Let the retriever take over what ``index_tensors`` gave for these rows, or make its index anew."""
        for layer, found in enumerate(tensors):
            if self.retriever is not None and found:
                try:
                    self.retriever.load_index(layer, store, found)
                except InputError as error:
                    logger.info("the saved index of layer %d is not used, a new one will be made: %s", layer, error)
