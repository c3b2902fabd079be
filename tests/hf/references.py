"""Plain references for the integrations: LoRA merged or injected by hand, rows put in front of a text by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from peft import LoraConfig, inject_adapter_in_model
from transformers.pytorch_utils import Conv1D

from benchmarks.quality.architectures.decoders import VOCAB_SIZE
from mplus.hf.reading.generating import generating
from mplus.hf.reading.reading import Reading
from mplus.memory.state import StreamView
from mplus.rows import MemoryRows
from mplus.stores.ram import RamStore
from tests.helpers import noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

TOLERANCE = noise.worst()
"""Largest error allowed in float32 between two ways of computing logits of order one: as rounding does it here."""


def ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """``[batch, tokens]`` random ids without the special ones."""
    return torch.randint(2, VOCAB_SIZE, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, relative to the spread of ``b`` where that is above 1."""
    return float((a - b).detach().abs().max() / b.detach().std().clamp(min=1))


@torch.no_grad()
def aligned(model: nn.Module) -> Any:
    """Move every weight to memory of its own: its place in a mapped file decides on the last bits of a product."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def stir(model: nn.Module, seed: int = 1) -> Any:
    """Redraw both factors of every LoRA: the second of a new one is zero, so all adapters would be the same."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            scale = 0.05 if ".lora_B." in name else 0.6 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def merged(plain: nn.Module, source: nn.Module, *adapters: str) -> Any:
    """A copy of ``plain`` with ``alpha / r * B A`` of the named adapters in ``source`` added to its weights."""
    twin = copy.deepcopy(plain)
    for name, layer in _lora(source):
        weight = twin.get_submodule(name).weight
        for adapter in adapters:
            if adapter in layer.lora_A:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                change = layer.scaling[adapter] * b @ a
                weight += change.T if isinstance(twin.get_submodule(name), Conv1D) else change
    return twin


@torch.no_grad()
def injected(plain: nn.Module, source: nn.Module, adapter: str) -> Any:
    """A copy of ``plain`` with the named adapter of ``source`` as PEFT's own, only one ("default"); trainable."""
    twin = copy.deepcopy(plain)
    layers = {name: layer for name, layer in _lora(source) if adapter in layer.lora_A}
    first = next(iter(layers.values()))
    rank = len(first.lora_A[adapter].weight)
    config = LoraConfig(r=rank, lora_alpha=first.scaling[adapter] * rank, target_modules=list(layers))
    inject_adapter_in_model(config, twin, "default")
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            getattr(twin.get_submodule(name), factor)["default"].weight.copy_(getattr(layer, factor)[adapter].weight)
    return twin


def write_and_read(model: Any, chunks: Sequence[Tensor], text: Tensor) -> Tensor:
    """The loss of ``text`` ``[1, n]`` after writing ``chunks`` into an empty memory, all in one graph."""
    engine = model.mplus_engine
    state = engine.mechanism.new_state(engine.layout)
    for chunk in chunks:
        made = engine.write([StreamView(state, RamStore(engine.layout))], chunk).hidden
        births = torch.arange(state.clock, state.clock + made[0].shape[1])
        new = [MemoryRows(rows[0], births, torch.zeros_like(births)) for rows in made]
        stm = tuple(MemoryRows.cat([old, rows]) for old, rows in zip(state.stm, new, strict=True))
        state = evolve(state, stm=stm, clock=state.clock + len(births))
    view = StreamView(state, RamStore(engine.layout).snapshot())
    with generating(model, Reading(engine.mechanism, [view], keep=False)):
        return model(text, labels=text, use_cache=False).loss


def _lora(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers with adapters, ours and PEFT's, by the name of the projection; a user's adapters lie around ours."""
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    prefix = "base_model.model." if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else ""
    return [(name.removeprefix(prefix).replace(".base_layer", ""), module) for name, module in found]
