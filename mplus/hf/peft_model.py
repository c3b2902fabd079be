"""A user's own ``PeftModel`` around a wrapped decoder."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from mplus.hf.passes import rebuild, subclass
from mplus.hf.virtual_tokens import mark_learned


class PeftMemoryModel:
    """Mixed into the class of a PeftModel around a wrapped decoder."""

    def get_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT; the decoder learns that keys and values of prefix tuning are none of a text."""
        return mark_learned(super().get_prompt(*args, **kwargs))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (peft_model_class, type(self).__mplus_base__), self.__dict__  # type: ignore[attr-defined]


def peft_model_class(base: type) -> type:
    """``base`` with ``PeftMemoryModel`` mixed in, and a ``forward`` that goes on from a cache."""
    signature = inspect.signature(base.forward)  # type: ignore[attr-defined]

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        reads = kwargs.get("memory") is not None or getattr(cache, "_mplus_reading", None) is not None
        if reads and self.active_peft_config.is_prompt_learning and cache is not None and cache.get_seq_length():
            return _go_on(self, cache, signature.bind_partial(self, *args, **kwargs))
        return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return subclass(base, PeftMemoryModel, forward=forward)


def _go_on(model: Any, cache: Any, call: inspect.BoundArguments) -> Any:
    """A forward of prompt learning behind a cache, which has the virtual tokens already.

    PEFT would drop the cache, or put them in once more.
    """
    _, *named = call.arguments.items()
    inputs = dict(named)
    inputs.update(inputs.pop("kwargs", {}))
    inputs.pop("task_ids", None)
    virtual = model.active_peft_config.num_virtual_tokens
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] + virtual == cache.get_seq_length() + text.shape[1]:
        inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], virtual), mask], 1)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + virtual
    return model.base_model(**inputs)
