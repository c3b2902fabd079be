"""Training of a retriever of chunks for any decoder, from plain texts: ``mplus train-retriever``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import lazy_exports

if TYPE_CHECKING:
    from mplus.training.chunk_retriever.fitting import FitOptions
    from mplus.training.chunk_retriever.pairs import Pairs, pairs_of
    from mplus.training.chunk_retriever.pooled import PooledStates
    from mplus.training.chunk_retriever.run import train_chunk_retriever

__all__ = ["FitOptions", "Pairs", "PooledStates", "pairs_of", "train_chunk_retriever"]

__getattr__, __dir__ = lazy_exports(
    "mplus.training.chunk_retriever",
    {
        "mplus.training.chunk_retriever.fitting": ("FitOptions",),
        "mplus.training.chunk_retriever.pairs": ("Pairs", "pairs_of"),
        "mplus.training.chunk_retriever.pooled": ("PooledStates",),
        "mplus.training.chunk_retriever.run": ("train_chunk_retriever",),
    },
)
