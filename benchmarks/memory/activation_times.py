"""Seconds of a training step by what becomes of its activations, in turns, by the processor time of this process.

    python -m benchmarks.memory.activation_times               # writes records/activation_times.json

On a CPU host and device are one memory: times show what copies and recomputation cost, and nothing of what a GPU hides
behind its computation. Processor time does not count what other programs take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory.activations import SIZES, WAYS, backward
from benchmarks.records import record_path, write
from mplus.environment import load_average, run_info

LAYERS, TOKENS = (4, 8), 512


def main() -> None:
    """Measure decoders of every number of layers, and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    before = load_average()
    decoders = [{"layers": layers, "tokens": TOKENS, "ways": ways(layers, rounds)} for layers in LAYERS]
    record = {**run_info(), "load_average": [before, load_average()], "rounds": rounds, "decoders": decoders}
    write(record_path("memory", "activation_times"), record)
    print(json.dumps(record, indent=1))


def ways(layers: int, rounds: int) -> list[dict[str, Any]]:
    """Time every way once a round, each round from another one on; give medians over the rounds of its ratio to "keep".

    Args:
        layers: of a Llama that is trained as a whole.
        rounds: after a first one that does not count.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers})).train()
    ids = torch.randint(SIZES["vocab_size"], (1, TOKENS))
    seconds: list[list[float]] = [[] for _ in WAYS]
    for number in range(-1, rounds):
        for place in range(len(WAYS)):
            place = (place + number) % len(WAYS)  # noqa: PLW2901 - whose turn it is
            begun = time.process_time()
            backward(model, lambda: model(ids, labels=ids).loss, *WAYS[place])
            if number >= 0:
                seconds[place].append(time.process_time() - begun)
    found = []
    for (way, share), own in zip(WAYS, seconds, strict=True):
        over = sorted(one / keep for one, keep in zip(own, seconds[0], strict=True))
        low, high = over[len(over) // 4], over[-1 - len(over) // 4]
        middle = round(statistics.median(over), 3)
        found.append({"way": way, "share": share, "over_keep": middle, "quartiles": [round(low, 3), round(high, 3)]})
    return found


if __name__ == "__main__":
    main()
