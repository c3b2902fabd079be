"""Virtual tokens of PEFT's prompt learning: in front of the text, as embeddings or as keys and values."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor
from transformers import Cache, PreTrainedModel

Prompt = TypeVar("Prompt", bound=Tensor | Cache)


def mark_learned(prompt: Prompt) -> Prompt:
    """Return ``prompt`` itself, noted as learned when it is a cache: it holds virtual tokens and no text."""
    if isinstance(prompt, Cache):
        prompt._mplus_learned = prompt.get_seq_length()  # type: ignore[attr-defined]
    return prompt


def only_learned(cache: Cache) -> bool:
    """Return whether a cache holds virtual tokens and nothing else, so that it depends on no memory."""
    learned = getattr(cache, "_mplus_learned", None)
    return learned is not None and int(cache.get_seq_length()) == learned


def embedded_in_front(model: PreTrainedModel) -> int:
    """Return how many virtual tokens the PeftModel around ``model``, which generates, embeds in front of a prompt.

    A PeftModel prepares the inputs while it generates. Virtual tokens that are keys and values pass through no layer.
    """
    return embedded_by(getattr(model.prepare_inputs_for_generation, "__self__", None))


def embedded_by(peft_model: Any) -> int:
    """Return how many virtual tokens ``peft_model`` embeds in front of a text; 0 for what is no PeftModel."""
    config = getattr(peft_model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        return 0
    return int(config.num_virtual_tokens)
