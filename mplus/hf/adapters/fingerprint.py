"""The fingerprint of a decoder: everything that a memory depends on, as plain data to compare and explain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mplus.config import JsonValue, MPlusConfig
from mplus.hf.adapters.lora import is_addition, plain_name
from mplus.hf.adapters.peft_layers import adapter_parts, is_peft_module
from mplus.hf.model.offloading import value_of
from mplus.memory.weights_state import MADE_WITH
from mplus.retrievers.base import Retriever
from mplus.stores.base import StoreLayout

SAMPLES = 64
"""Values read of every base tensor; adapters and additions are read in full."""

Group = Literal["base", "adapters", "lora", "additions"]

CONTENT_FIELDS = ("mechanism", "variant", "memory_tokens_per_chunk", "short_term_tokens")
"""Config fields that shape what is stored; another store, budget or backend never locks a memory out."""


def fingerprint(
    model: nn.Module,
    config: MPlusConfig,
    layout: StoreLayout,
    retriever: Retriever | None,
    saved: Mapping[str, JsonValue] | None = None,
) -> dict[str, JsonValue]:
    """Return facts by name: layout, config, retriever, and one digest each of base weights, our adapters and additions.

    Args:
        model: a wrapped decoder.
        config, layout, retriever: those it was wrapped with.
        saved: the facts of a file to compare with, if there is one. Files of earlier versions, which do not say what
            their rows were made with, have a digest of all LoRA adapters in place of ours.
    """
    plain = config.to_dict()
    added: JsonValue = digest(model, "additions")
    if saved is not None and not any(name.startswith("mplus.") for name, _ in model.named_parameters()):
        # Nothing can differ. Earlier versions made begin rows for every mechanism, and took their digest.
        added = saved.get("additions", added)
    ours: Group = "adapters" if saved is None or MADE_WITH in saved else "lora"
    return {
        "layers": layout.layers,
        "hidden_size": layout.hidden_size,
        "key_size": layout.key_size,
        **{name: plain[name] for name in CONTENT_FIELDS},
        **{f"retriever.{name}": fact for name, fact in (retriever.facts() if retriever is not None else {}).items()},
        "base": digest(model, "base"),
        "adapters": digest(model, ours),
        "additions": added,
    }


def digest(model: nn.Module, group: Group) -> str:
    """Return a digest of a group of parameters: the decoder's own, our adapters or all of LoRA, or what mplus added.

    It is the same wherever the tensors lie; what accelerate has offloaded is read back, a tensor at a time.

    Raises:
        NotSupported: a tensor has no values.
    """
    found = hashlib.sha256()
    of_user = _of_user(model) if group == "base" else set()
    # Under the names they have without PEFT, so that a base keeps its digest when adapters come.
    named = [(plain_name(name).replace(".original_module.", "."), name, one) for name, one in model.named_parameters()]
    for plain, name, tensor in sorted(named, key=lambda one: one[0]):
        if _is_in_group(plain, group) and id(tensor) not in of_user:
            found.update(f"{plain}{list(tensor.shape)}{tensor.dtype}".encode())
            # One tensor at a time: accelerate may have offloaded more of them than fit into memory.
            found.update(_content(value_of(model, name) if tensor.is_meta else tensor, sampled=group == "base"))
    return found.hexdigest()[:32]


def _is_in_group(name: str, group: Group) -> bool:
    """Return whether a parameter is in a group: "lora" has all of LoRA, "adapters" only those of mplus."""
    if name.startswith("mplus."):
        return group == "additions"
    if ".lora_" in name:
        return group == "lora" or (group == "adapters" and is_addition(name))
    return group == "base"


def _of_user(model: nn.Module) -> set[int]:
    """Return the ids of tensors that adapters of any kind have."""
    return {
        id(parameter)
        for module in filter(is_peft_module, model.modules())
        for parts in adapter_parts(module).values()
        for _, parameter in parts
    }


def _content(tensor: Tensor, sampled: bool) -> bytes:
    flat = tensor.detach().flatten()
    if sampled and flat.shape[0] > SAMPLES:
        flat = flat[torch.linspace(0, flat.shape[0] - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
    flat = flat.cpu().contiguous()
    return bytes(flat.view(torch.uint8).numpy()) if flat.dtype != torch.bool else bytes(flat.numpy())
