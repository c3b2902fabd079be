"""The Auto classes: ``AutoConfig`` and ``AutoModelForCausalLM`` know the model type "mplus"."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mplus.config import MPlusConfig

MODEL_TYPE = "mplus"


class MPlusModelConfig(PreTrainedConfig):
    """``config.json`` of a saved mplus model.

    Attributes:
        mplus: the memory configuration, as plain data.
        base_model: name or path of the decoder it was made for, or None.
        base_config: the decoder's own configuration, as plain data.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        mplus: dict[str, Any] | None = None,
        base_model: str | None = None,
        base_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.mplus = mplus if mplus is not None else {}
        self.base_model = base_model
        self.base_config = base_config
        super().__init__(**kwargs)

    @property
    def memory_config(self) -> MPlusConfig:
        """The memory configuration."""
        return MPlusConfig.from_dict(self.mplus)


class MPlusForCausalLM(PreTrainedModel):
    """What ``AutoModelForCausalLM`` calls for the model type "mplus"; it returns a wrapped decoder, never itself."""

    config_class = MPlusModelConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``mplus.from_pretrained``."""
        from mplus.hf.saving import from_pretrained

        for name in ("_from_auto", "adapter_kwargs"):
            kwargs.pop(name, None)  # about the repository of the additions, not about the decoder's
        attention = getattr(kwargs.get("config"), "_attn_implementation", None)
        if attention is not None:  # the Auto class has put it there
            kwargs.setdefault("attn_implementation", attention)
        return from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: MPlusModelConfig, **kwargs: Any) -> Any:
        from mplus.hf.saving import base_config_of
        from mplus.hf.wrapping import wrap

        return wrap(AutoModelForCausalLM.from_config(base_config_of(config), **kwargs), config.memory_config)


def register_auto_classes() -> None:
    """Register with transformers; harmless when done before."""
    AutoConfig.register(MODEL_TYPE, MPlusModelConfig, exist_ok=True)
    AutoModelForCausalLM.register(MPlusModelConfig, MPlusForCausalLM, exist_ok=True)
