"""Retrievers of whole chunks by name, and the names one needs to write another.

A chunk retriever derives from ``ChunkRetriever`` and scores the chunks of a memory of text tokens ("kv") for a
question, once for all layers. It is not trained with the decoder.
``mplus.testing.chunk_retrievers.ChunkRetrieverConformance`` tries one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.config import flag, must_be, number, one_of, options_of, whole
    from mplus.retrievers.chunks.base import ChunkDecoder, ChunkRetriever, Chunks, ChunkShape, Query

__all__ = [
    "CHUNK_RETRIEVERS",
    "ChunkDecoder",
    "ChunkRetriever",
    "ChunkShape",
    "Chunks",
    "Query",
    "flag",
    "must_be",
    "number",
    "one_of",
    "options_of",
    "whole",
]

CHUNK_RETRIEVERS: Registry[ChunkRetriever] = Registry(
    "chunk retriever",
    group="mplus.chunk_retrievers",
    base="mplus.retrievers.chunks.base:ChunkRetriever",
    builtin={
        "dense": "mplus.retrievers.chunks.dense:DenseRetriever",
        "hidden": "mplus.retrievers.chunks.hidden:HiddenRetriever",
        "hybrid": "mplus.retrievers.chunks.hybrid:HybridRetriever",
        "trained": "mplus.retrievers.chunks.trained:TrainedRetriever",
        "words": "mplus.retrievers.chunks.words:WordRetriever",
    },
)

__getattr__, __dir__ = lazy_exports(
    "mplus.retrievers.chunks",
    {
        "mplus.config": ("flag", "must_be", "number", "one_of", "options_of", "whole"),
        "mplus.retrievers.chunks.base": ("ChunkDecoder", "ChunkRetriever", "ChunkShape", "Chunks", "Query"),
    },
)
