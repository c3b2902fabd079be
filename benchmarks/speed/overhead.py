"""What wrapping and writing cost, as ratios measured side by side in one run.

    python -m benchmarks.speed.overhead            # writes records/overhead.json

1. A wrapped decoder of 100 M parameters with ``memory=None`` against the same decoder unwrapped, 128 tokens.
2. Writing a chunk of 512 tokens (K = 256 rows, retriever keys included) against the decoder's forward over 512 + K
   tokens without logits.
3. Bytes a memory takes beyond its rows.

Each pair is timed in turns (``mplus.timing``), and the median of the ratios is reported.
"""

from __future__ import annotations

import copy
import json
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mplus
from benchmarks.records import record_path, write
from mplus.environment import run_info
from mplus.timing import Arm, in_rounds, median, quantile, ratio

K, CHUNK, READ = 256, 512, 128


def decoder() -> Any:
    """Build a Llama of about 100 M parameters with random weights."""
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


def compare(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Time both in turns; return the median of the ratios of ``first`` over ``second``, and both medians."""
    times = in_rounds([Arm("first", lambda _: first()), Arm("second", lambda _: second())], pairs, torch.device("cpu"))
    found = [one / other for one, other in zip(times["first"], times["second"], strict=True)]
    return {
        "ratio": ratio(times, "first", "second"),
        "ratio_quartiles": [round(quantile(found, share), 4) for share in (0.25, 0.75)],
        "seconds": round(median(times["first"]), 4),
        "base_seconds": round(median(times["second"]), 4),
        "pairs": pairs,
    }


@torch.no_grad()
def measure(pairs: int) -> dict[str, Any]:
    """Make all three measurements."""
    base = decoder()
    wrapped = mplus.wrap(copy.deepcopy(base), mplus.MPlusConfig(short_term_tokens=1024, retrieved_tokens=256))
    short, chunk, long = (torch.randint(8000, (1, n)) for n in (READ, CHUNK, CHUNK + K))
    memory = wrapped.new_memory()
    memory.write(torch.randint(8000, (CHUNK * 6,)))  # from here on every write drops rows into long-term memory
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "wrapped_without_memory": compare(lambda: wrapped(input_ids=short), lambda: base(input_ids=short), pairs),
        "write": compare(lambda: memory.write_chunk(chunk), lambda: base.model(input_ids=long, use_cache=False), pairs),
        "bytes_beyond_rows": bytes_beyond_rows(wrapped),
    }


def bytes_beyond_rows(wrapped: Any, streams: int = 20) -> int:
    """Return the bytes that Python takes for one empty stream, which holds no rows."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    memory = wrapped.new_memory(batch_size=streams)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    generators = sum(generator.get_state().numel() for generator in memory.streams.generators)
    return int(taken + generators + memory.nbytes) // streams


if __name__ == "__main__":
    record = {**run_info(), **measure(int(sys.argv[1]) if len(sys.argv) > 1 else 25)}
    write(record_path("speed", "overhead"), record)
    print(json.dumps(record, indent=1))
