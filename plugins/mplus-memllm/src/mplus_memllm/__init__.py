"""MemLLM (arXiv 2404.11672) for mplus: a store of triples that the decoder writes, and asks while it generates."""

from __future__ import annotations

from mplus_memllm.calls import write_call
from mplus_memllm.mechanism import MemLLMMechanism

__all__ = ["MemLLMMechanism", "write_call"]
