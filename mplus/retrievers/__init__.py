"""Retrievers of long-term rows by name, and the names one needs to write another.

A retriever derives from ``Retriever``. ``check_selection`` refuses arguments that make no sense, ``top_k`` sorts scores
and settles ties, and ``best_rows`` does so for more rows than fit at once.
``mplus.testing.retrievers.RetrieverConformance`` tries a retriever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.config import flag, must_be, number, one_of, options_of, whole
    from mplus.retrievers.base import Heads, Projections, Retriever, RetrieverShape, Selection, check_selection, top_k
    from mplus.retrievers.ranking import best_rows
    from mplus.stores.base import Chunk, StoreView

__all__ = [
    "RETRIEVERS",
    "Chunk",
    "Heads",
    "Projections",
    "Retriever",
    "RetrieverShape",
    "Selection",
    "StoreView",
    "best_rows",
    "check_selection",
    "flag",
    "must_be",
    "number",
    "one_of",
    "options_of",
    "top_k",
    "whole",
]

RETRIEVERS: Registry[Retriever] = Registry(
    "retriever",
    group="mplus.retrievers",
    base="mplus.retrievers.base:Retriever",
    builtin={
        "attention": "mplus.retrievers.attention:AttentionRetriever",
        "centroid": "mplus.retrievers.centroid:CentroidRetriever",
        "faiss_ivf": "mplus.retrievers.faiss_ivf:FaissIvfRetriever",
        "linear": "mplus.retrievers.linear:LinearRetriever",
        "random": "mplus.retrievers.random:RandomRetriever",
    },
)

__getattr__, __dir__ = lazy_exports(
    "mplus.retrievers",
    {
        "mplus.config": ("flag", "must_be", "number", "one_of", "options_of", "whole"),
        "mplus.retrievers.base": (
            "Heads",
            "Projections",
            "Retriever",
            "RetrieverShape",
            "Selection",
            "check_selection",
            "top_k",
        ),
        "mplus.retrievers.ranking": ("best_rows",),
        "mplus.stores.base": ("Chunk", "StoreView"),
    },
)
