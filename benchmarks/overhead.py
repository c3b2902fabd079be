"""What wrapping and writing cost, as ratios measured side by side in one run.

    python -m benchmarks.overhead            # writes records/overhead.json

1. A wrapped decoder of 100 M parameters with ``memory=None`` against the same decoder unwrapped, 128 tokens.
2. Writing a chunk of 512 tokens (K = 256 rows, retriever keys included) against the decoder's forward over 512 + K
   tokens without logits.
3. Bytes a memory takes beyond its rows.

Pairs are interleaved, their order alternates, and the median of the ratios is reported.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mplus
from mplus.environment import run_info
from tools import recording

K, CHUNK, READ = 256, 512, 128


def decoder() -> Any:
    """A Llama of about 100 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def ratios(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Median time of ``first`` over ``second``, pair by pair."""
    first(), second()
    found, times = [], ([], [])  # type: ignore[var-annotated]
    for pair in range(pairs):
        taken = [0.0, 0.0]
        for which in (0, 1) if pair % 2 else (1, 0):
            begun = time.perf_counter()
            (first, second)[which]()
            taken[which] = time.perf_counter() - begun
            times[which].append(taken[which])
        found.append(taken[0] / taken[1])
    quartiles = statistics.quantiles(found, n=4)
    return {
        "ratio": round(statistics.median(found), 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "seconds": round(statistics.median(times[0]), 4),
        "base_seconds": round(statistics.median(times[1]), 4),
        "pairs": pairs,
    }


@torch.no_grad()
def measure(pairs: int) -> dict[str, Any]:
    """All three measurements."""
    base = decoder()
    wrapped = mplus.wrap(copy.deepcopy(base), mplus.MPlusConfig(short_term_tokens=1024, retrieved_tokens=256))
    short, chunk, long = (torch.randint(8000, (1, n)) for n in (READ, CHUNK, CHUNK + K))
    memory = wrapped.new_memory()
    memory.write(torch.randint(8000, (CHUNK * 6,)))  # from here on every write drops rows into long-term memory
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "wrapped_without_memory": ratios(lambda: wrapped(input_ids=short), lambda: base(input_ids=short), pairs),
        "write": ratios(lambda: memory.write_chunk(chunk), lambda: base.model(input_ids=long, use_cache=False), pairs),
        "bytes_beyond_rows": bytes_beyond_rows(wrapped),
    }


def bytes_beyond_rows(wrapped: Any, streams: int = 20) -> int:
    """Python memory of one empty stream: an empty memory holds no rows."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    memory = wrapped.new_memory(batch_size=streams)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    generators = sum(generator.get_state().numel() for generator in memory.generators)
    return int(taken + generators + memory.nbytes) // streams


if __name__ == "__main__":
    result = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
    path = recording.write("overhead.json", {**run_info(), **result})
    print(path.read_text(encoding="utf-8"))
