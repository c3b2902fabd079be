"""Gates of training: gradients in float32, under bfloat16 autocast, and with activations held elsewhere."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.gates.decoders import Decoders, ids, written
from benchmarks.gpu.session import Gate, Session
from mplus.config import JsonValue
from mplus.testing.rounding import InFloat64
from mplus.training import train
from mplus.training.activations.managed import ActivationPlan

Gradients = dict[str, Tensor]
WAYS: tuple[tuple[str, float | str | None], ...] = (
    ("recompute", None), ("swap", None), ("memo", 0.0), ("memo", 0.5), ("memo", 1.0), ("memo", "auto"),
)  # fmt: skip
AGAIN = 4
"""Steps with each way: the share of "auto" is found in the first, and buffers are used again in the later ones."""


def steps(session: Session) -> None:
    """Compare the gradients of one step behind a memory, of everything that is trained."""
    for name in ("mplus",) if session.few else ("mplus", "kv"):
        for half in (False, True):
            with session.gate(f"step/{name}/{'bfloat16 autocast' if half else 'float32'}") as gate:
                three = Decoders.of(name, torch.float32, session.device)
                plain = gradients(three.plain, half)
                with InFloat64():
                    exact = gradients(three.exact, False)
                compare(gate, gradients(three.there, half), plain, exact)
    with session.gate("train/four steps of a recipe") as gate:
        losses = trained()
        gate.holds(all(loss == loss and loss < 20 for loss in losses), f"losses {losses}")  # noqa: PLR0124 - NaN


def gradients(model: Any, half: bool) -> Gradients:
    """Return the gradients of the loss of a text behind a memory."""
    model = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    memory = written(model, 4)
    text = ids(40, 100).to(device)
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        loss = model(text, labels=text, memory=memory).loss
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def compare(gate: Gate, found: Gradients, plain: Gradients, exact: Gradients) -> None:
    """Compare all gradients, each beside the largest of its kind of parameter."""
    gate.holds(found.keys() == plain.keys(), f"other parameters have gradients: {sorted(found.keys() ^ plain.keys())}")
    for name, gradient in found.items():
        gate.close(gradient, plain[name].float(), exact[name])


def trained() -> list[float]:
    """Train the smallest recipe where accelerate puts it; return its losses."""
    table: dict[str, JsonValue] = {
        "name": "gpu",
        "model": {"path": "stories260K"},
        "memory": {"chunk_tokens": 16, "min_chunk_tokens": 4, "memory_tokens_per_chunk": 4, "short_term_tokens": 8,
                   "retrieved_tokens": 4, "long_term_tokens": 16, "retriever": {"name": "linear", "width": 8}},
        "optimizer": {"learning_rate": 1e-3, "dtype": "bfloat16"},
        "data": {"novel": {"kind": "documents", "shipped": "novel", "chunk_tokens": [8, 16], "target_tokens": 24}},
        "stages": [{"name": "all", "steps": 4, "long_term": True,
                    "objectives": [{"name": "two_chunk", "data": "novel", "reader": "read"}]}],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = train(table, out=folder, progress=False)
        return [float(line["loss"]) for line in run.records]


def activations(session: Session) -> None:
    """Compare the gradients with activations recomputed and swapped with those of everything kept."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    tokens = 64
    if not session.tiny:  # so much that copies and computation are under way at the same time
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}
        tokens = 2048
    for dtype in (torch.float32,) if session.tiny else (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        fields: dict[str, Any] = {**sizes, "num_key_value_heads": 2, "vocab_size": 256}
        plain: Any = LlamaForCausalLM(LlamaConfig(**fields))
        plain = plain.to(dtype).train()
        model = copy.deepcopy(plain).to(session.device)
        text = torch.randint(4, 250, (1, tokens), generator=torch.Generator().manual_seed(1)).to(session.device)
        # The truth is computed where the rest is: in float64 a CPU would take minutes.
        double = copy.deepcopy(model).double()
        with InFloat64():
            exact = of_plan(double, text, ActivationPlan())
        kept = of_plan(model, text, ActivationPlan())
        for way, share in WAYS[: 2 if session.few else None]:
            name = f"activations/{way}{'' if share is None else f' {share}'}/{dtype}".replace("torch.", "")
            with session.gate(name) as gate:
                plan = ActivationPlan(way, share)
                for _ in range(1 if session.few else AGAIN):
                    found = of_plan(model, text, plan)
                    for one, gradient in found.items():
                        gate.close(gradient, kept[one].cpu(), exact[one].cpu())


def of_plan(model: Any, text: Tensor, plan: ActivationPlan) -> Gradients:
    """Return the gradients of one step with activations held as planned."""
    model.zero_grad(set_to_none=True)
    with plan.applied(model):
        loss = model(text, labels=text).loss
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
