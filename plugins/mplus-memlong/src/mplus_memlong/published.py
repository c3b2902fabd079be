"""A decoder of the released code of MemLong, by its configuration and weights: a Llama of transformers, wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import mplus
from mplus.config import JsonValue, MPlusConfig
from mplus.errors import CheckpointError
from mplus.hf.decoders.published_model import empty_llama, fill
from mplus_memlong.mechanism import MemLongMechanism

POSITIONS = {"Zero": "zero", "Continual": "cumulative"}
"""What the released code computes under the names that its configuration has."""
TABLE = "retriever_table"
GATE = "self_attn.ret_gate.output_gate"


def memory_config(config: Mapping[str, Any], backend: str = "auto") -> MPlusConfig:
    """Return the configuration of the memory that the released code has by ``config``, a published ``config.json``.

    Raises:
        CheckpointError: a field is missing.
    """
    try:
        window = min(config["max_position_embeddings"], config["embedder_max_tokens"], config["mem_group_size"])
        options: dict[str, JsonValue] = {
            "name": "memlong",
            "memory_layer": config["mem_layer"],
            "read_layers": config["ret_attn_layers"],
            "group_tokens": window,
            "positions": POSITIONS[config["position_type"]],
            "gate": config["use_gate"],
            "bank_dtype": config["mem_dtype"],
            "encoder_tokens": config["embedder_max_tokens"],
        }
        return MPlusConfig.from_dict(
            {
                "mechanism": options,
                "variant": "published",
                "chunk_tokens": config["last_context_length"],
                "long_term_tokens": config["memory_size"],
                "retrieved_tokens": config["ret_group_size"] * window,
                "backend": backend,
                "adapters": False,
            }
        )
    except KeyError as error:
        raise CheckpointError(f"config.json of a MemLong must have a field or value {error}") from error


def wrapped(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, backend: str
) -> tuple[Any, MemLongMechanism]:
    """Return the decoder with its memory, and the mechanism of that.

    Args:
        config: the published ``config.json``.
        weights: by their published names.
        dtype: of weights and computation.
        backend: attention backend, by name.

    Raises:
        CheckpointError: a field or a tensor is missing, or there is one too many.
    """
    decoder = empty_llama(config, dtype=dtype, attn_implementation="eager" if backend == "reference" else "sdpa")
    wanted = set(dict(decoder.named_parameters()))
    found = {name for name in weights if name != TABLE and GATE not in name}
    if found != wanted:
        raise CheckpointError(f"weights must be those of the decoder, wrong or missing are {sorted(found ^ wanted)}")
    for name in sorted(found):
        fill(decoder, name, weights[name], torch.device("cpu"))
    model: Any = mplus.wrap(decoder, memory_config(config, backend))
    mechanism = model.mplus_engine.mechanism
    assert isinstance(mechanism, MemLongMechanism)  # noqa: S101 - by its name in the configuration
    gate = mechanism.additions.gate
    if gate is not None:
        layers = mechanism.additions.read_layers
        gates = torch.stack([weights[f"model.layers.{layer}.{GATE}"].flatten() for layer in layers])
        gate.data.copy_(gates)
    return model, mechanism
