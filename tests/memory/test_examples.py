"""The examples in the docstrings of what a user, or the author of a store or policy, meets first."""

from __future__ import annotations

from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus
from mplus.eviction.base import EvictionPolicy, topk_rows
from mplus.eviction.unpinned import UnpinnedRows
from mplus.memory import Memory, StreamState
from mplus.rows import MemoryRows
from mplus.stores.access_log import NEVER, READS, AccessLog
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.ram import RamStore
from tests.helpers.docstrings import run_examples

ROWS = MemoryRows(torch.zeros(3, 8), torch.arange(3), torch.zeros(3, dtype=torch.int64))


def test_a_memory() -> None:
    decoder = str(files("mplus") / "data" / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = mplus.wrap(
        AutoModelForCausalLM.from_pretrained(decoder),
        mplus.MPlusConfig(memory_tokens_per_chunk=8, short_term_tokens=32, retrieved_tokens=8),
        check=False,
    )
    question = tokenizer("Ada had an office in room", return_tensors="pt")
    run_examples(Memory, model=model, tokenizer=tokenizer, question=question)


def test_rows_stores_policies_and_states() -> None:
    store = RamStore(StoreLayout(layers=1, hidden_size=8))
    store.append(0, ROWS)
    run_examples(MemoryRows, MemoryRows=MemoryRows)
    run_examples(MemoryStore)
    run_examples(EvictionPolicy, EvictionPolicy=EvictionPolicy, topk_rows=topk_rows, store=store)
    mixed = RamStore(StoreLayout(layers=1, hidden_size=8))
    mixed.append(0, ROWS.replace(source=torch.tensor([0, 1, 0])))
    run_examples(UnpinnedRows, UnpinnedRows=UnpinnedRows, store=mixed)
    run_examples(StreamState, StreamState=StreamState, rows=ROWS)
    run_examples(AccessLog, AccessLog=AccessLog, READS=READS, NEVER=NEVER)
