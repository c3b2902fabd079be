"""The Auto classes: ``AutoConfig`` and ``AutoModelForCausalLM`` know the model type "mplus"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mplus.config import MPlusConfig
from mplus.errors import CheckpointError, ConfigError

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


def read_config(folder: Path) -> MPlusModelConfig:
    """``config.json`` in ``folder``. Raises CheckpointError when it is missing or is not of an mplus model."""
    try:
        plain, _ = MPlusModelConfig.get_config_dict(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} must hold a readable config.json: {error}") from error
    if plain.get("model_type") != MPlusModelConfig.model_type or not plain.get("mplus"):
        found = plain.get("model_type")
        raise CheckpointError(f"{folder} must hold a config.json with model_type 'mplus', got {found!r}")
    return MPlusModelConfig.from_dict(plain)


def as_memory_config(config: Any) -> MPlusConfig:
    """What ``mplus.wrap`` takes as a config: an ``MPlusConfig``, its fields, or where it is kept; None: the default.

    Raises:
        ConfigError: it is none of these, or there is no such file.
        CheckpointError: a folder without a saved model.
    """
    if config is None or isinstance(config, MPlusConfig):
        return config or MPlusConfig()
    if isinstance(config, Mapping):
        return MPlusConfig.from_dict(config)
    if not isinstance(config, str | Path):
        raise ConfigError(
            "config must be an MPlusConfig, a dict of its fields, or the path of a .json or .toml file or of a saved "
            f"model, got {config!r:.80}"
        )
    path = Path(config)
    if not path.exists():
        raise ConfigError(f"config must be the path of a .json or .toml file or of a saved model, got {str(path)!r}")
    return read_config(path).memory_config if path.is_dir() else MPlusConfig.from_file(path)


def base_class_of(config: MPlusModelConfig) -> Any:
    """The Auto class that makes the decoder inside: for text, or for images and text, as it was when it was saved."""
    plain = config.base_config or {}
    kind, made = str(plain.get("model_type")), (plain.get("architectures") or [None])[0]
    text, image = (
        names.get(kind) for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    )
    sees = image is not None and text != made and (text is None or image == made)
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


class MPlusForCausalLM(PreTrainedModel):
    """What ``AutoModelForCausalLM`` calls for the model type "mplus"; it returns a wrapped decoder, never itself."""

    config_class = MPlusModelConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``mplus.from_pretrained``."""
        from mplus.hf.pretrained.save import from_pretrained

        for name in ("_from_auto", "adapter_kwargs"):
            kwargs.pop(name, None)  # about the repository of the additions, not about the decoder's
        attention = getattr(kwargs.get("config"), "_attn_implementation", None)
        if attention is not None:  # the Auto class has put it there
            kwargs.setdefault("attn_implementation", attention)
        return from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: MPlusModelConfig, **kwargs: Any) -> Any:
        from mplus.hf.model.wrapping import wrap
        from mplus.hf.pretrained.save import base_config_of

        return wrap(base_class_of(config).from_config(base_config_of(config), **kwargs), config.memory_config)


def register_auto_classes() -> None:
    """Register with transformers; harmless when done before."""
    AutoConfig.register(MODEL_TYPE, MPlusModelConfig, exist_ok=True)
    AutoModelForCausalLM.register(MPlusModelConfig, MPlusForCausalLM, exist_ok=True)
