"""RET-LLM (arXiv 2305.14322) for mplus: triples with vectors in a hash table, asked by calls while decoding."""

from __future__ import annotations

from mplus_retllm.calls import write_call
from mplus_retllm.mechanism import RETLLMMechanism

__all__ = ["RETLLMMechanism", "write_call"]
