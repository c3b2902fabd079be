"""Saving what mplus added to a decoder, and building the wrapped decoder again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mplus.errors import CheckpointError
from mplus.hf.adapters import OURS
from mplus.hf.auto import MPlusModelConfig
from mplus.hf.model_card import model_card
from mplus.hf.wrap import wrap

WEIGHTS = "model.safetensors"
BASE = "base"


def is_addition(name: str) -> bool:
    """Whether a tensor of this name was added by mplus."""
    return name.startswith("mplus.") or any(f".lora_{part}.{ours}." in name for part in "AB" for ours in OURS)


def save_pretrained(
    model: Any,
    base_save: Callable[..., Any],
    directory: Any,
    args: tuple[Any, ...],
    save_base: bool,
    kwargs: dict[str, Any],
) -> None:
    """See ``MemoryModel.save_pretrained``."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    push = kwargs.pop("push_to_hub", False)
    repo_id = kwargs.pop("repo_id", folder.name)
    state: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or model.state_dict()
    if save_base:
        plain = {name.replace(".base_layer.", "."): t for name, t in state.items() if not is_addition(name)}
        with _plain_config(model):
            base_save(str(folder / BASE), *args, state_dict=plain, **kwargs)
    if kwargs.get("is_main_process", True):
        additions = {name: tensor.detach().contiguous() for name, tensor in state.items() if is_addition(name)}
        save_file(additions, folder / WEIGHTS, metadata={"format": "pt"})
        config = _model_config(model)
        config.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model, config, save_base), encoding="utf-8")
    if push:
        model.push_to_hub(repo_id, token=kwargs.get("token"))


class _plain_config:
    """The decoder's config as it was before wrapping, while its own save runs."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.config._attn_implementation = self.model.mplus_installed.base_attention

    def __exit__(self, *exception: Any) -> None:
        engine = self.model.mplus_engine
        if engine.retrofit.technique == "attention":
            self.model.config._attn_implementation = "mplus_" + self.model.mplus_installed.base_attention


def _model_config(model: Any) -> MPlusModelConfig:
    with _plain_config(model):
        base = model.config.to_dict()
    return MPlusModelConfig(
        mplus=model.mplus_config.to_dict(),
        base_model=model.config._name_or_path or None,
        base_config=base,
        architectures=["MPlusForCausalLM"],
    )


def base_config_of(config: MPlusModelConfig) -> Any:
    """The decoder's own configuration object."""
    if not config.base_config or "model_type" not in config.base_config:
        raise CheckpointError("config.json must hold base_config with a model_type, got " + repr(config.base_config))
    plain = dict(config.base_config)
    return AutoConfig.for_model(plain.pop("model_type"), **plain)


def from_pretrained(path: Any, *, base: Any = None, check: bool = True, **kwargs: Any) -> Any:
    """Build a wrapped decoder from what ``save_pretrained`` wrote.

    Args:
        path: folder, or name of a repository on the Hub.
        base: the decoder (a model, or where to load it from); default: saved along, else where it came from.
        check: run the self-check of ``mplus.wrap``.
        kwargs: for ``AutoModelForCausalLM.from_pretrained`` of the decoder.

    Raises:
        CheckpointError: no mplus model there, no way to find the decoder, or tensors that do not fit.
    """
    folder = _folder(path, kwargs)
    config = MPlusModelConfig.from_pretrained(folder)
    if config.model_type != "mplus" or not config.mplus:
        raise CheckpointError(f"{path} must hold a config.json with model_type 'mplus', got {config.model_type!r}")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{path} must hold {WEIGHTS}, which is missing")
    if base is None:
        base = folder / BASE if (folder / BASE).is_dir() else config.base_model
    if base is None:
        raise CheckpointError(f"{path} does not say which decoder it was made for: pass base=")
    if isinstance(base, str | Path):
        base = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    with safe_open(folder / WEIGHTS, "pt") as file:
        pool = file.get_tensor("mplus.pool") if "mplus.pool" in file.keys() else None
    model = wrap(base, config.memory_config, pool=pool, check=check)
    load_additions(model, load_file(folder / WEIGHTS), str(path))
    return model


def load_additions(model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy saved additions into a wrapped decoder. Raises CheckpointError naming what does not fit."""
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    expected = {name: tensor for name, tensor in decoder.state_dict().items() if is_addition(name)}
    missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if missing or foreign or wrong:
        raise CheckpointError(
            f"{where} does not fit the decoder: missing {missing[:4]}, superfluous {foreign[:4]}, "
            + "of another shape "
            + str([f"{name} {list(tensors[name].shape)} for {list(expected[name].shape)}" for name in wrong[:4]])
        )
    decoder.load_state_dict(dict(tensors), strict=False)


def _folder(path: Any, kwargs: Mapping[str, Any]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    return Path(snapshot_download(str(path), **hub))
