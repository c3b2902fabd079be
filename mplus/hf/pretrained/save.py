"""Saving what mplus added to a decoder, and building the wrapped decoder again."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from mplus.errors import CheckpointError, NotSupported
from mplus.hf.adapters.fingerprint import digest
from mplus.hf.adapters.lora import refuse_conflicts
from mplus.hf.adapters.names import is_addition, plain_name
from mplus.hf.model.modes import on_meta, present
from mplus.hf.model.wrapping import wrap
from mplus.hf.pretrained.auto import MPlusModelConfig, base_class_of, read_config
from mplus.hf.pretrained.hub import COMMIT, find_folder, upload
from mplus.hf.pretrained.model_card import model_card
from mplus.hf.pretrained.peft_folders import load_injected, memory_folder, save_injected, with_adapters
from mplus.hf.pretrained.unwrap_copy import plain_decoder

WEIGHTS = "model.safetensors"
BASE = "base"
HOW_TO_LOAD = "mplus.from_pretrained(folder), or the Auto classes of transformers after `import mplus.hf`"
"""Said in config.json, since transformers knows the model type "mplus" only then."""


def save_pretrained(
    model: Any,
    directory: Any,
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None,
    push_to_hub: bool,
    save_base: bool,
    kwargs: dict[str, Any],
) -> None:
    """See ``MemoryModel.save_pretrained``."""
    if kwargs.get("distributed_checkpoint"):
        raise NotSupported("distributed_checkpoint is not supported with memory: pass a gathered state_dict")
    refuse_conflicts(model)
    if save_base and state_dict is None and not hasattr(model, "hf_device_map") and on_meta(model):
        raise NotSupported(
            "transformers cannot save a decoder that accelerate has offloaded without a device map: bring it back with "
            "accelerate.hooks.remove_hook_from_submodules(model), or save without save_base"
        )
    hub = {name: kwargs.pop(name) for name in ("repo_id", "private", *COMMIT) if name in kwargs}
    tags = kwargs.pop("tags", None)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if save_base:
        decoder, tree = plain_decoder(model)
        plain = None if state_dict is None else tree.plain_state(state_dict)
        decoder.save_pretrained(folder / BASE, is_main_process=is_main_process, state_dict=plain, **kwargs)
    elif not on_meta(model) and digest(model, "base") != model.mplus_installed.base_digest:
        warnings.warn(
            "the decoder's own weights have changed since mplus.wrap and are not saved with the additions: "
            "use save_pretrained(..., save_base=True)",
            stacklevel=3,
        )
    if not is_main_process:
        return
    state = model.state_dict() if state_dict is None else state_dict
    additions = present(model, state, is_addition)
    additions = {plain_name(name): tensor.contiguous() for name, tensor in additions.items()}
    save_file(additions, folder / WEIGHTS, metadata={"format": "pt"})
    adapters = save_injected(model, folder, state)
    config = _model_config(model)
    config.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model, config, save_base, tags), encoding="utf-8")
    if push_to_hub:
        patterns = [WEIGHTS, "config.json", "README.md", *adapters, *([f"{BASE}/*"] if save_base else [])]
        upload(folder, hub.pop("repo_id", folder.name), patterns=patterns, token=kwargs.get("token"), **hub)


def push_to_hub(model: Any, repo_id: str, save_base: bool, hub: dict[str, Any], save: dict[str, Any]) -> Any:
    """See ``MemoryModel.push_to_hub``."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_base=save_base, **save)
        return upload(Path(folder), repo_id, **hub)


def _model_config(model: Any) -> MPlusModelConfig:
    return MPlusModelConfig(
        mplus=model.mplus_config.to_dict(),
        base_model=model.config._name_or_path or None,
        base_config={**model.config.to_dict(), "architectures": [type(model).__name__]},
        architectures=["MPlusForCausalLM"],
        how_to_load=HOW_TO_LOAD,
    )


def base_config_of(config: MPlusModelConfig) -> Any:
    """The decoder's own configuration object."""
    if not config.base_config or "model_type" not in config.base_config:
        raise CheckpointError("config.json must hold base_config with a model_type, got " + repr(config.base_config))
    plain = dict(config.base_config)
    return AutoConfig.for_model(plain.pop("model_type"), **plain)


def from_pretrained(
    path: Any, *, base: Any = None, config: MPlusModelConfig | None = None, check: bool = True, **kwargs: Any
) -> Any:
    """Build a wrapped decoder from what ``save_pretrained`` wrote.

    Args:
        path: folder, or name of a repository on the Hub (``revision`` and ``subfolder`` are its own).
        base: the decoder (a model, or where to load it from); default: saved along, else where it came from. Adapters
            saved along are put on it, unless it has some.
        config: instead of the ``config.json`` there.
        check: run the self-check of ``mplus.wrap``.
        kwargs: for ``from_pretrained`` of the decoder's Auto class; and ``is_trainable``, whether adapters
            saved along are to be trained, as in PEFT.

    Returns:
        The wrapped decoder, or a wrapped ``PeftModel`` when one was saved.

    Raises:
        CheckpointError: no mplus model there, no way to find the decoder, or tensors that do not fit.
    """
    folder = find_folder(path, kwargs)
    for name in ("revision", "subfolder"):
        kwargs.pop(name, None)
    trainable, inner = kwargs.pop("is_trainable", False), memory_folder(folder)
    if not (inner / WEIGHTS).is_file():
        adapters = (folder / "adapter_config.json").is_file()
        raise CheckpointError(
            f"{path} must hold {WEIGHTS}, which is missing"
            + adapters * "; it holds an adapter of PEFT, for PeftModel.from_pretrained around a wrapped decoder"
        )
    config = config if config is not None else read_config(inner)
    try:
        additions = load_file(inner / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{inner / WEIGHTS} must be a whole safetensors file: {error}") from error
    decoder = _base(base, config, inner, kwargs)
    if inner != folder and not hasattr(decoder, "peft_config"):
        decoder = with_adapters(decoder, folder, trainable)
    load_injected(decoder, inner, trainable)
    model = wrap(decoder, config.memory_config, pool=additions.get("mplus.pool"), check=check)
    load_additions(model, additions, str(path))
    return model


def _base(base: Any, config: MPlusModelConfig, folder: Path, kwargs: dict[str, Any]) -> Any:
    if base is None and not (folder / BASE).is_dir():
        return _found_again(config, str(folder), kwargs)
    base = folder / BASE if base is None else base
    return base_class_of(config).from_pretrained(base, **kwargs) if isinstance(base, str | Path) else base


def _found_again(config: MPlusModelConfig, where: str, kwargs: Mapping[str, Any]) -> Any:
    """The decoder that additions were saved for, from where it was then."""
    base_model = config.base_model
    if base_model is None:
        raise CheckpointError(f"{where} does not say which decoder it was made for: pass base=")
    try:
        return base_class_of(config).from_pretrained(base_model, **kwargs)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(
            f"the decoder that {where} was made for cannot be loaded from {base_model!r}, where it was when that was "
            f"saved ({first}): if it was moved or renamed, pass base= with its folder or the decoder itself"
        ) from error


def load_additions(model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy saved additions into a wrapped decoder. Raises CheckpointError naming what does not fit."""
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = {plain_name(name): (name, tensor) for name, tensor in decoder.state_dict().items() if is_addition(name)}
    expected = {name: tensor for name, (_, tensor) in named.items()}
    missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if missing or foreign or wrong:
        raise CheckpointError(
            f"{where} does not fit the decoder: missing {missing[:4]}, superfluous {foreign[:4]}, "
            "of another shape "
            + str([f"{name} {list(tensors[name].shape)} for {list(expected[name].shape)}" for name in wrong[:4]])
        )
    decoder.load_state_dict({named[name][0]: tensor for name, tensor in tensors.items()}, strict=False)
