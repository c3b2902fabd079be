"""The Auto classes: ``AutoConfig`` and ``AutoModelForCausalLM`` know the model type "mplus"."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mplus.hf.model.wrapping import wrap
from mplus.hf.pretrained.config import MODEL_TYPE, MPlusModelConfig, base_class_of, base_config_of
from mplus.hf.pretrained.load import from_pretrained


class MPlusForCausalLM(PreTrainedModel):
    """The class that ``AutoModelForCausalLM`` finds for the model type "mplus"; it makes wrapped decoders only."""

    config_class = MPlusModelConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a wrapped decoder, as ``mplus.from_pretrained`` does."""
        for name in ("_from_auto", "adapter_kwargs"):
            kwargs.pop(name, None)  # about the repository of the additions, not about the decoder's
        attention = getattr(kwargs.get("config"), "_attn_implementation", None)
        if attention is not None:  # the Auto class has put it there
            kwargs.setdefault("attn_implementation", attention)
        return from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: MPlusModelConfig, **kwargs: Any) -> Any:
        return wrap(base_class_of(config).from_config(base_config_of(config), **kwargs), config.memory_config)


def register_auto_classes() -> None:
    """Register with transformers; harmless when done before."""
    AutoConfig.register(MODEL_TYPE, MPlusModelConfig, exist_ok=True)
    AutoModelForCausalLM.register(MPlusModelConfig, MPlusForCausalLM, exist_ok=True)
