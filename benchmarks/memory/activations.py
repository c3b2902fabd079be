"""Bytes that training holds for backward, and what holding them elsewhere costs: a Llama, and a decoder with memory.

    python -m benchmarks.memory.activations               # writes records/activations.json
    python -m benchmarks.memory.activations --rounds 7    # with times, on a machine that does nothing else

Bytes are counted and exact. On a CPU host and device are one memory, so that times show what copies and recomputation
cost, and nothing of what a GPU hides behind its computation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mplus
from benchmarks.records import record_path, write
from mplus.environment import load_average, run_info
from mplus.hf.pretrained.shipped import load_decoder
from mplus.timing import Arm, in_rounds, ratio
from mplus.training import manage_activations

WAYS: tuple[tuple[str, float | None], ...] = (
    ("keep", None), ("recompute", None), ("swap", None), ("memo", 0.0), ("memo", 0.5), ("memo", 1.0),
)  # fmt: skip
LAYERS, TOKENS = 16, 512
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def main() -> int:
    """Measure both decoders; return 1 where a gradient differs from that with everything kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=0, help="in which each way is timed; 0: no times are taken")
    rounds = parser.parse_args().rounds
    decoders = [llama(rounds), with_memory(rounds)]
    record = {**run_info(), "load_average": load_average(), "rounds": rounds, "decoders": decoders}
    write(record_path("memory", "activations"), record)
    print(json.dumps(record, indent=1))
    return 0 if all(way["equal"] for decoder in decoders for way in decoder["ways"]) else 1


def llama(rounds: int) -> dict[str, Any]:
    """Measure a Llama of many layers that is trained as a whole."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    ids = torch.randint(SIZES["vocab_size"], (1, TOKENS))
    name = f"a Llama of {LAYERS} layers, {TOKENS} tokens, all weights trained"
    return {
        "name": name,
        "layers": LAYERS,
        "tokens": TOKENS,
        "ways": ways(model, lambda: model(ids, labels=ids).loss, rounds),
    }


def with_memory(rounds: int) -> dict[str, Any]:
    """Measure stories260K, of which adapters are trained on a text behind a memory."""
    torch.manual_seed(0)
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(short_term_tokens=64, chunk_tokens=64))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name or parameter_name.startswith("mplus."))
    memory = model.new_memory()
    ids = torch.randint(4, 500, (1, 320))
    memory.write(ids[0, :256])
    text = ids[:, 256:].repeat(1, 6)
    layers = model.config.num_hidden_layers
    name = f"stories260K of {layers} layers, {text.shape[1]} tokens behind 64 rows of M+, adapters trained"
    found = ways(model.train(), lambda: model(text, labels=text, memory=memory).loss, rounds)
    return {"name": name, "layers": layers, "tokens": text.shape[1], "ways": found}


def ways(model: Any, loss: Callable[[], torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """Count the bytes of each way, compare gradients, and time them in turns where ``rounds`` are wanted."""
    found, kept = [], None
    for way, share in WAYS:
        gradients, held = backward(model, loss, way, share)
        kept = gradients if kept is None else kept
        equal = all(torch.equal(one, other) for one, other in zip(gradients, kept, strict=True))
        found.append({"way": way, "share": share, **held, "equal": equal})
    arms = [Arm(str(place), partial(step, model, loss, *way)) for place, way in enumerate(WAYS)]
    times = in_rounds(arms, rounds, torch.device("cpu")) if rounds else {}
    for place, one in enumerate(found if times else ()):
        one["seconds_over_keep"] = ratio(times, str(place), "0")
    return found


def step(model: Any, loss: Callable[[], torch.Tensor], way: str, share: float | None, number: int) -> None:
    """Do one step, of round ``number``, to time it."""
    backward(model, loss, way, share)


@torch.enable_grad()
def backward(
    model: Any, loss: Callable[[], torch.Tensor], way: str, share: float | None
) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Return the gradients of one step, and the bytes held between its forward and its backward."""
    model.zero_grad(set_to_none=True)
    with manage_activations(model, way, swapped_share=share) as counter:
        value = loss()
    held = {"device_bytes": counter.device, "host_bytes": counter.host}
    value.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return gradients, {**held, "recomputed_tokens": counter.recomputed_tokens}


if __name__ == "__main__":
    raise SystemExit(main())
