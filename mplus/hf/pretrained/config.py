"""``config.json`` of a saved mplus model, and the forms of config that ``mplus.wrap`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mplus.config import Component, JsonValue, MPlusConfig
from mplus.errors import CheckpointError, ConfigError
from mplus.retrievers.chunks.trained import SAVED

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
        mplus: dict[str, JsonValue] | None = None,
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

    def memory_config_in(self, folder: Path) -> MPlusConfig:
        """Return the memory configuration as it was saved in a folder, with the files there that it names."""
        config = self.memory_config
        files = {option: str(folder / SAVED) for option, value in config.retriever.options.items() if value == SAVED}
        if not files:
            return config
        return evolve(config, retriever=Component(config.retriever.name, {**config.retriever.options, **files}))

    def decoder_config(self) -> PreTrainedConfig:
        """Return the decoder's own configuration object. Raises CheckpointError where there is none."""
        if not self.base_config or "model_type" not in self.base_config:
            raise CheckpointError("config.json must hold base_config with a model_type, got " + repr(self.base_config))
        plain = dict(self.base_config)
        return AutoConfig.for_model(plain.pop("model_type"), **plain)


def read_config(folder: Path) -> MPlusModelConfig:
    """Read ``config.json`` in ``folder``. Raises CheckpointError when it is missing or is not of an mplus model."""
    try:
        plain, _ = MPlusModelConfig.get_config_dict(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} must hold a readable config.json: {error}") from error
    if plain.get("model_type") != MPlusModelConfig.model_type or not plain.get("mplus"):
        found = plain.get("model_type")
        raise CheckpointError(f"{folder} must hold a config.json with model_type 'mplus', got {found!r}")
    return MPlusModelConfig.from_dict(plain)


def as_memory_config(config: MPlusConfig | Mapping[str, JsonValue] | str | Path | None) -> MPlusConfig:
    """Read a config as ``mplus.wrap`` takes it: an ``MPlusConfig``, its fields, or where it is kept; None: the default.

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
    return read_config(path).memory_config_in(path) if path.is_dir() else MPlusConfig.from_file(path)


def base_class_of(config: MPlusModelConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """Return the Auto class that makes the decoder inside: for text, or for images and text, as when it was saved."""
    plain = config.base_config or {}
    kind, made = str(plain.get("model_type")), (plain.get("architectures") or [None])[0]
    text, image = (
        names.get(kind) for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    )
    sees = image is not None and text != made and (text is None or image == made)
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM
