"""Gates of StaticReader: its steps are those of the wrapped decoder, plain, compiled, and replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu.gates.decoders import Decoders, ids, in_mode, written
from benchmarks.gpu.session import Session
from mplus.hf.model.static_reader import StaticReader

STEPS = 6
PROMPTS = 3
COMPILED: Mapping[str, dict[str, Any] | None] = {
    "not compiled": None,
    "compiled": {"fullgraph": True},
    "CUDA graphs": {"mode": "reduce-overhead", "fullgraph": True},
}
TRIED: Sequence[tuple[str, torch.dtype, Sequence[str]]] = (
    ("mplus", torch.float32, ("not compiled", "CUDA graphs", "compiled")),
    ("mplus", torch.bfloat16, ("not compiled", "CUDA graphs")),
    ("kv", torch.float32, ("not compiled", "CUDA graphs")),
)
"""Mechanism, dtype and how: compiling takes half a minute each time."""


def static_reader(session: Session) -> None:
    """Open the gates, for M+ and ``kv``, in float32 and bfloat16."""
    for name, dtype, kinds in TRIED[:1] if session.few else TRIED:
        three = Decoders.of(name, dtype, session.device)
        plain, exact, _ = three.compute(by_forward)
        for kind in kinds[:1] if session.few else kinds:
            options = COMPILED[kind]
            if session.tiny and options is not None:
                options = {"fullgraph": True, "backend": "eager"}  # no compiler is needed for it
            with session.gate(f"static reader/{name}/{kind}/{dtype}".replace("torch.", "")) as gate:
                torch.compiler.reset()
                counters.clear()
                reader = StaticReader(three.there, options)
                for found, one, truth in zip(by_reader(three.there, reader), plain, exact, strict=True):
                    gate.close(found, one, truth)
                skipped = counters["inductor"]["cudagraph_skips"]
                gate.holds(not skipped, f"no CUDA graph was made of {skipped} graphs")


@torch.no_grad()
def by_forward(model: Any) -> list[Tensor]:
    """Return the logits of prompts and of the steps behind each, by the wrapped decoder with a cache that grows."""
    found, device = [], model.get_input_embeddings().weight.device
    with in_mode(model):
        memory = written(model, 4)
        for number in range(PROMPTS):
            output = model(ids(7 + number, 30 + number).to(device), memory=memory, use_cache=True)
            found.append(output.logits[:, -1])
            for step in range(STEPS):
                token = ids(1, 40 + step).to(device)
                output = model(token, memory=memory, past_key_values=output.past_key_values)
                found.append(output.logits[:, -1])
    return found


def by_reader(model: Any, reader: StaticReader) -> list[Tensor]:
    """Return the same from a static cache, which is used again for every prompt."""
    found, device, state = [], model.get_input_embeddings().weight.device, None
    memory = written(model, 4)
    for number in range(PROMPTS):
        prompt = ids(7 + number, 30 + number).to(device)
        room = STEPS + PROMPTS if state is None else 0
        state = reader.prefill(prompt, memory=memory, room=room, into=state)
        found.append(state.logits.clone())
        found += [reader.step(state, ids(1, 40 + step).to(device)).clone() for step in range(STEPS)]
    return found
