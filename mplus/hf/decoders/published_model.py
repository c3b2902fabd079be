"""A Llama without weights, to be filled with published ones a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mplus.errors import CheckpointError

NOT_THE_DECODERS = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Keys of a Llama configuration that say where a checkpoint came from, and nothing about its decoder."""
OLD_KEYS = ("rope_scaling", "rope_theta")
"""Keys of older Llama configurations, which transformers still reads."""


def empty_llama(
    plain: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> LlamaForCausalLM:
    """Build a Llama in eval mode whose parameters take no memory yet; its buffers (rotary frequencies) are ready.

    Args:
        plain: a Llama configuration as plain data; keys that are not a Llama's are left out.
        dtype: dtype of the parameters.
        attn_implementation: as in transformers.

    Raises:
        CheckpointError: transformers refuses the configuration.
    """
    known = {*LlamaConfig().to_dict(), *OLD_KEYS} - set(NOT_THE_DECODERS)
    try:
        config = LlamaConfig(**{key: value for key, value in plain.items() if key in known and key != "model_type"})
        with init_empty_weights(include_buffers=False):
            model: LlamaForCausalLM = LlamaForCausalLM._from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json must describe a Llama that transformers can build: {error}") from error
    model.eval()
    return model


def fill(model: nn.Module, name: str, tensor: Tensor, device: torch.device) -> None:
    """Give the parameter ``name`` memory on ``device`` and the values of ``tensor``, in the dtype of the model."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    empty = module.get_parameter(last)
    content = torch.empty(empty.shape, dtype=empty.dtype, device=device)
    content.copy_(tensor)
    setattr(module, last, nn.Parameter(content))


def finish(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Tie what is tied, bring the buffers to ``device``, and read ``generation_config.json`` where there is one."""
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
