"""What a read of a bank of 65,536 tokens costs beside a plain prefix of as many tokens as it brings back.

    python -m mplus_memlong.bench records/reading.json

A decoder with random weights reads 64 tokens. "plain" has keys and values of 1,024 tokens in front of them in a
key/value cache of transformers, in every layer, and scores all groups of the bank by one product. "memory" finds 8
groups of 128 tokens, gathers their rows and reads them: in every layer, so that both attend to the same number of keys,
or, as published, in four. "alone" reads the 64 tokens and nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import mplus
from mplus.config import MPlusConfig
from mplus.environment import load_average, run_info
from mplus.hf.decoders.bench_models import random_llama, twin
from mplus.timing import Arm, in_rounds, ratio, summary

BANK, GROUP, FOUND, TEXT, ROUNDS = 65_536, 128, 1024, 64, 15
DECODER = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


def bank(model: Any) -> Any:
    """Return a memory of ``BANK`` tokens: random rows, since reading costs the same whatever they say."""
    memory = model.new_memory()
    ids = torch.randint(1024, (GROUP,), generator=torch.Generator().manual_seed(0))
    memory.write(ids, source="first")
    [state], [store] = memory.states, memory.stores
    rows = store.gather(0, store.ids(0))

    def change(states: list[Any]) -> None:
        own = state
        generator = torch.Generator().manual_seed(1)
        for _ in range(BANK // GROUP - 1):
            births = torch.arange(own.clock, own.clock + GROUP)
            made = torch.randn(rows.projected.shape, generator=generator)
            store.append(0, rows.replace(birth=births, projected=made))
            key = torch.nn.functional.normalize(torch.randn(own.group_key.shape[1], generator=generator), dim=-1)
            own = own.with_group(ids, 0, key, own.group_time[:0])
        states[0] = own

    memory.streams.change(change)
    return memory


def measure(read_layers: list[int]) -> dict[str, Any]:
    """Return the seconds of all arms, and their ratios."""
    base = random_llama(DECODER, torch.float32, torch.device("cpu"), 0)
    plain = twin(base)
    options = {"name": "memlong", "memory_layer": read_layers[0], "read_layers": read_layers, "group_tokens": GROUP}
    config: dict[str, Any] = {
        "mechanism": options,
        "chunk_tokens": GROUP,
        "retrieved_tokens": FOUND,
        "long_term_tokens": BANK,
    }
    model = mplus.wrap(base, MPlusConfig.from_dict({**config, "adapters": False}), check=False)
    memory = bank(model)
    text = torch.randint(1024, (1, TEXT), generator=torch.Generator().manual_seed(2))
    [state] = memory.states
    caches: dict[int, DynamicCache] = {}

    def cache(number: int) -> None:
        caches.clear()
        caches[number] = DynamicCache()
        part = torch.randn(1, 8, FOUND, 64, generator=torch.Generator().manual_seed(3))
        for layer in range(DECODER["num_hidden_layers"]):
            caches[number].update(part, part, layer)

    def prefix(number: int) -> Tensor:
        (state.group_key @ state.group_key[-1]).topk(FOUND // GROUP)
        found: Tensor = plain(text, past_key_values=caches[number]).logits
        return found

    arms = [
        Arm("memory", lambda number: model(text, memory=memory)),
        Arm("plain", prefix, cache),
        Arm("alone", lambda number: plain(text)),
    ]
    times = in_rounds(arms, ROUNDS, torch.device("cpu"), warm=2)
    return {
        "read_layers": read_layers,
        "memory_over_plain": ratio(times, "memory", "plain"),
        "memory_over_alone": ratio(times, "memory", "alone"),
        **{name: summary(seconds) for name, seconds in times.items()},
    }


def main(record: str) -> None:
    """Measure, and write the record."""
    found = {
        "decoder": DECODER,
        "bank_tokens": BANK,
        "group_tokens": GROUP,
        "retrieved_tokens": FOUND,
        "text_tokens": TEXT,
        "load_average": load_average(),
        "every_layer": measure(list(range(8))),
        "as_published": measure([4, 5, 6, 7]),
    }
    Path(record).parent.mkdir(exist_ok=True, parents=True)
    Path(record).write_text(json.dumps({**run_info(), **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
