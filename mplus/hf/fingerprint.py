"""What a memory depends on, as plain data that can be compared and explained."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mplus.config import MPlusConfig
from mplus.hf.names import plain_name
from mplus.retrievers.base import Retriever
from mplus.stores.base import StoreLayout

SAMPLES = 64
"""Values read of every base tensor; adapters and additions are read in full."""

CONTENT_FIELDS = ("mechanism", "variant", "memory_tokens_per_chunk", "short_term_tokens")
"""Config fields that shape what is stored; another store, budget or backend never locks a memory out."""


def fingerprint(
    model: nn.Module, config: MPlusConfig, layout: StoreLayout, retriever: Retriever | None
) -> dict[str, Any]:
    """Facts by name: layout, config, retriever, and one digest each of base weights, adapters and additions."""
    plain = config.to_dict()
    return {
        "layers": layout.layers,
        "hidden_size": layout.hidden_size,
        "key_size": layout.key_size,
        **{name: plain[name] for name in CONTENT_FIELDS},
        **{f"retriever.{name}": fact for name, fact in (retriever.facts() if retriever is not None else {}).items()},
        **{group: digest(model, group) for group in ("base", "adapters", "additions")},
    }


def digest(model: nn.Module, group: Literal["base", "adapters", "additions"]) -> str:
    """A digest of one group of parameters: the decoder's own, all LoRA adapters, or what else mplus added."""
    found = hashlib.sha256()
    for name, tensor in sorted(_plain_names(model)):
        if group == ("additions" if name.startswith("mplus.") else "adapters" if ".lora_" in name else "base"):
            found.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
            found.update(_content(tensor, sampled=group == "base"))
    return found.hexdigest()[:32]


def _plain_names(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters under the names they have without LoRA, so that a base keeps its digest when adapters come."""
    return [(plain_name(name), parameter) for name, parameter in model.named_parameters()]


def _content(tensor: Tensor, sampled: bool) -> bytes:
    if tensor.device.type == "meta":
        return b"meta"
    flat = tensor.detach().flatten()
    if sampled and flat.shape[0] > SAMPLES:
        flat = flat[torch.linspace(0, flat.shape[0] - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
    flat = flat.cpu().contiguous()
    return bytes(flat.view(torch.uint8).numpy()) if flat.dtype != torch.bool else bytes(flat.numpy())
