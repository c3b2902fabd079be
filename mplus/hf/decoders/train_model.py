"""The decoder that a training starts from: loaded, or built from nothing; and which of its weights are trained."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mplus.config import JsonValue, MPlusConfig
from mplus.errors import CheckpointError, ConfigError
from mplus.hf.adapters.lora import is_adapter, is_addition, plain_name
from mplus.hf.model.installed import WrappedModel
from mplus.hf.model.wrapping import wrap
from mplus.hf.pretrained.config import MPlusModelConfig, read_config
from mplus.hf.pretrained.load import without_bars
from mplus.hf.pretrained.save import BASE, WEIGHTS, load_additions
from mplus.hf.pretrained.shipped import RECALL_TINY, STORIES260K
from mplus.hf.pretrained.smollm2 import smollm2_folder

TrainTokenizer: TypeAlias = PreTrainedTokenizerBase
"""What a training gives text to, and saves with its model."""

SHIPPED = {"stories260K": STORIES260K, "recall-tiny": RECALL_TINY}
"""Decoders that come with the package, by the name a recipe gives them."""

SMOLLM2 = "smollm2"
"""Name in a recipe of the decoder that ``mplus get smollm2`` brings."""

EMBEDDING_STD = 0.05
"""Standard deviation of tied embeddings under init "mimetic"."""


def load_for_training(path: str, config: MPlusConfig, dtype: torch.dtype) -> WrappedModel:
    """Load a decoder from a folder or the Hub and wrap it for ``config``.

    If it is one that mplus saved, its adapters and the mechanism's parameters go on from where they were. Adapters, or
    a module such as the retriever, that were not saved with it begin anew.

    Raises:
        ConfigError: there is no such decoder.
        CheckpointError: what was saved with it does not fit ``config``.
    """
    where = _place(path)
    folder = Path(where)
    with without_bars():
        plain = MPlusModelConfig.get_config_dict(folder)[0] if (folder / WEIGHTS).is_file() else {}
        if plain.get("model_type") != MPlusModelConfig.model_type:
            wrapped: WrappedModel = wrap(_load(path, where, dtype), config)
            return wrapped
        saved = read_config(folder)
        base = folder / BASE if (folder / BASE).is_dir() else saved.base_model
        if base is None:
            raise CheckpointError(f"{folder} must hold its decoder in {BASE}/, or name one; it does neither")
        try:
            decoder = _load(str(base), base, dtype)
        except ConfigError as error:
            raise CheckpointError(
                f"the decoder that {folder} was made for is not at {str(base)!r}, where it was when that was saved: "
                "load both with mplus.from_pretrained(..., base=) and save them together, with save_base=True"
            ) from error
        model: WrappedModel = wrap(decoder, config)
    _go_on(model, folder)
    return model


def _place(path: str) -> str | Path:
    """Return where a decoder lies: one that comes with the package or that it brought, or what ``path`` says."""
    if path != SMOLLM2 or Path(path).is_dir():
        return SHIPPED.get(path, path)
    folder = smollm2_folder()
    if not folder.is_dir():
        raise ConfigError(
            f"path {path!r} must be in the cache folder, and {folder} is not there: run `mplus get smollm2`"
        )
    return folder


def _load(path: str, where: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"path must be a decoder that transformers can load, got {path!r}: {first}") from error


def _go_on(model: WrappedModel, folder: Path) -> None:
    """Load saved additions.

    Adapters and modules of the mechanism that were not saved stay new; what this mechanism has no place for (a
    retriever of another one, the rows that memories started from) is left out.
    """
    saved = load_file(folder / WEIGHTS)
    own = {plain_name(name): tensor for name, tensor in model.state_dict().items() if is_addition(name)}
    there, wanted = ({_part(name) for name in tensors} for tensors in (saved, own))
    kept = {name: tensor for name, tensor in saved.items() if is_adapter(name) or _part(name) in wanted}
    new = {name: tensor for name, tensor in own.items() if _part(name) not in there}
    load_additions(model, {**kept, **new}, str(folder))


def _part(name: str) -> str:
    """Return the part of what mplus adds that a tensor belongs to: the adapters, or one child of ``model.mplus``."""
    return "adapters" if is_adapter(name) else name.split(".")[1]


def build_for_training(
    model_type: str,
    fields: Mapping[str, JsonValue],
    init: Literal["default", "mimetic"],
    config: MPlusConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> WrappedModel:
    """Build a decoder with new weights and wrap it for ``config``. Random numbers come from torch's global generator.

    Args:
        model_type: as in a transformers configuration ("llama").
        fields: of that configuration; vocabulary size and special tokens are taken from the tokenizer, if there is one.
        init: "default": that of transformers. "mimetic": attention starts as matching (keys as queries) and copying
            (output the transpose of values), which gets a small decoder past the step of learning to look back.
        config: of the memory.
        tokenizer: or None.

    Raises:
        ConfigError: no such model type, a field it does not have, or one that "mimetic" cannot start.
    """
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except ValueError as error:
        raise ConfigError(f"model_type must be one that transformers knows, got {model_type!r}") from error
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ConfigError(f"{name!r} is not a field of a {model_type} configuration{hint}")
    sizes: dict[str, JsonValue] = {}
    if tokenizer is not None:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        sizes = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in special}}
    try:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **{**sizes, **fields}), dtype=torch.float32
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"a {model_type} with {dict(fields)} cannot be built: {error}") from error
    if init == "mimetic":
        start_mimetic(model)
    model = wrap(model, config)
    if init == "mimetic":
        model.mplus_engine.mechanism.draw_parameters()
    return model


@torch.no_grad()
def start_mimetic(model: PreTrainedModel) -> None:
    """Start attention as matching and copying (see ``build_for_training``), where modules are called as in a Llama.

    Raises:
        ConfigError: there are none.
    """
    attentions = [m for m in model.modules() if all(hasattr(m, f"{name}_proj") for name in "qkvo")]
    downs = [
        m.get_parameter("down_proj.weight")
        for m in model.modules()
        if isinstance(getattr(m, "down_proj", None), nn.Linear)
    ]
    if not attentions or not downs:
        raise ConfigError(
            f"init 'mimetic' needs attention with q_proj, k_proj, v_proj and o_proj and MLPs with down_proj, which "
            f"{type(model).__name__} has not: use init = 'default'"
        )
    inputs, outputs = model.get_input_embeddings(), cast("nn.Module", model.get_output_embeddings())
    embedding, head = inputs.get_parameter("weight"), outputs.get_parameter("weight")
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not head:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if head is embedding:
        nn.init.normal_(embedding, std=EMBEDDING_STD)
    for attention in attentions:
        queries, keys, values, output = (attention.get_parameter(f"{name}_proj.weight") for name in "qkvo")
        size = cast("int", attention.head_dim)
        groups = queries.shape[0] // keys.shape[0]
        keys.copy_(queries.view(-1, groups, size, queries.shape[1])[:, 0].reshape(keys.shape))
        nn.init.orthogonal_(values)
        spread = values.view(-1, 1, size, values.shape[1]).expand(-1, groups, -1, -1)
        output.copy_(spread.reshape(-1, values.shape[1]).T / groups)
    for down in downs:
        down.mul_(1 / math.sqrt(2 * len(downs)))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder, on the Hub, or of a shipped decoder. Raises ConfigError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(_place(name))
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"tokenizer must be one that transformers can load, got {name!r}: {first}") from error


def choose_trained(model: nn.Module, parameters: Literal["adapters", "all"]) -> dict[str, nn.Parameter]:
    """Let ``adapters`` (and the mechanism's own parameters) or ``all`` be trained, in float32; the rest is frozen.

    Returns:
        What is trained, by name.

    Raises:
        ConfigError: there is nothing.
    """
    for name, parameter in model.named_parameters():
        wanted = (parameters == "all" or is_addition(name)) and parameter.is_floating_point()
        parameter.requires_grad_(wanted)
        if wanted:  # steps of 1e-5 of a weight would be lost in half precision
            parameter.data = parameter.data.float()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        config = cast("MPlusConfig", model.mplus_config)
        raise ConfigError(
            f"the mechanism {config.mechanism.name!r} has no parameters of its own and memory.adapters is "
            f"{config.adapters}, so there is nothing to train: set memory.adapters, or optimizer.parameters to 'all'"
        )
    return trained


def save_trained(
    model: WrappedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, save_base: bool
) -> None:
    """Write a model that ``mplus.from_pretrained`` reads, and its tokenizer."""
    with without_bars():
        model.save_pretrained(folder, save_base=save_base)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
