"""Choosing the long-term rows that a prompt brings back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.retrievers.base import Retriever

__all__ = ["RETRIEVERS"]

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
