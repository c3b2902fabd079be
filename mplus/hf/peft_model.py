"""A user's own ``PeftModel`` around a wrapped decoder."""

from __future__ import annotations

from typing import Any

from mplus.hf.names import is_addition
from mplus.hf.passes import rebuild, subclass

_INNER = "base_model.model."
"""What a PeftModel puts in front of its decoder's names."""


class PeftMemoryModel:
    """Mixed into the class of a PeftModel: it goes on saving its own adapter, and nothing of ours with it."""

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        """As in PEFT. What mplus added is saved by the decoder's own ``save_pretrained``."""
        state = self.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]
        # PEFT leaves out the other adapters it knows of; it does not know of ours.
        own = {name: tensor for name, tensor in state.items() if not is_addition(name.removeprefix(_INNER))}
        return super().save_pretrained(save_directory, *args, state_dict=own, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (peft_model_class, type(self).__mplus_base__), self.__dict__  # type: ignore[attr-defined]


def peft_model_class(base: type) -> type:
    """``base`` with ``PeftMemoryModel`` mixed in."""
    return subclass(base, PeftMemoryModel)
