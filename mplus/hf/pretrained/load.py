"""``from_pretrained``, by itself and behind the Auto classes of transformers; commands load the tokenizer too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mplus.errors import CheckpointError
from mplus.hf.model.wrapping import wrap
from mplus.hf.pretrained.config import MODEL_TYPE, MPlusModelConfig, base_class_of, read_config
from mplus.hf.pretrained.hub import find_folder
from mplus.hf.pretrained.peft_folders import load_injected, memory_folder, with_adapters
from mplus.hf.pretrained.save import BASE, WEIGHTS, load_additions, load_calibrations

if TYPE_CHECKING:
    from peft import PeftModel

    from mplus.hf.model.model_class import MemoryModel

Where = str | os.PathLike[str]


def from_pretrained(
    path: Where,
    *,
    base: Where | PreTrainedModel | PeftModel | None = None,
    config: MPlusModelConfig | None = None,
    check: bool = True,
    **kwargs: Any,
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

    Example:
        >>> model.save_pretrained("decoder-with-memory", save_base=True)
        >>> mplus.from_pretrained("decoder-with-memory", dtype=torch.bfloat16).dtype
        torch.bfloat16
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
    decoder = _base(base, config, inner, partial(base_class_of(config).from_pretrained, **kwargs))
    # Saved from a PeftModel: the adapters lie beside the folder of the memory.
    if inner != folder and isinstance(decoder, PreTrainedModel) and not hasattr(decoder, "peft_config"):
        decoder = with_adapters(decoder, folder, trainable)
    load_injected(decoder, inner, trainable)
    model = wrap(decoder, config.memory_config_in(inner), pool=additions.get("mplus.pool"), check=check)
    load_additions(model, additions, str(path))
    load_calibrations(model, inner)
    return model


def _base(
    base: Where | PreTrainedModel | PeftModel | None,
    config: MPlusModelConfig,
    folder: Path,
    load: Callable[[Where], PreTrainedModel],
) -> PreTrainedModel | PeftModel:
    if base is None and not (folder / BASE).is_dir():
        return _found_again(config, str(folder), load)
    base = folder / BASE if base is None else base
    return load(base) if isinstance(base, str | os.PathLike) else base


def _found_again(config: MPlusModelConfig, where: str, load: Callable[[Where], PreTrainedModel]) -> PreTrainedModel:
    """Load the decoder that additions were saved for, from the place it had then."""
    base_model = config.base_model
    if base_model is None:
        raise CheckpointError(f"{where} does not say which decoder it was made for: pass base=")
    try:
        return load(base_model)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(
            f"the decoder that {where} was made for cannot be loaded from {base_model!r}, where it was when that was "
            f"saved ({first}): if it was moved or renamed, pass base= with its folder or the decoder itself"
        ) from error


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
        return wrap(base_class_of(config).from_config(config.decoder_config(), **kwargs), config.memory_config)


def register_auto_classes() -> None:
    """Register with transformers; harmless when done before."""
    AutoConfig.register(MODEL_TYPE, MPlusModelConfig, exist_ok=True)
    AutoModelForCausalLM.register(MPlusModelConfig, MPlusForCausalLM, exist_ok=True)


def load_with_tokenizer(
    path: Where, *, tokenizer: Where | None = None, device: str | None = None, dtype: str = "auto"
) -> tuple[MemoryModel, PreTrainedTokenizerBase]:
    """Load a wrapped decoder, in eval mode, and its tokenizer.

    Args:
        path: folder written by ``save_pretrained``, or a repository on the Hub.
        tokenizer: where to take it from; None: from ``path``, else from the decoder saved along, else from where the
            decoder came from.
        device: where to put the decoder; None: as loaded.
        dtype: as in transformers: "auto", "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: no mplus model there, or no tokenizer was found.
    """
    with without_bars():
        number = dtype if dtype == "auto" else getattr(torch, dtype)
        model = from_pretrained(path, dtype=number).eval()
        if device is not None:
            model = model.to(device)
        return model, _tokenizer(path, tokenizer)


def load_decoder_with_tokenizer(
    path: Where, *, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder as people have it, without memory and in eval mode, and its tokenizer.

    Args:
        path: folder or repository on the Hub, of a decoder that was never wrapped.
        device, dtype: as for ``load_with_tokenizer``.

    Raises:
        CheckpointError: there is no decoder with a tokenizer, or one that was saved with a memory.
    """
    try:
        with without_bars():
            number = dtype if dtype == "auto" else getattr(torch, dtype)
            decoder = AutoModelForCausalLM.from_pretrained(path, dtype=number).eval()
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} must be a decoder with its tokenizer, and cannot be loaded: {first}") from error
    if hasattr(decoder, "mplus_engine"):
        raise CheckpointError(f"{path} must be a decoder without memory, it was saved with one: give the decoder's own")
    return (decoder if device is None else decoder.to(device)), tokenizer


def _tokenizer(path: Where, named: Where | None) -> PreTrainedTokenizerBase:
    if named is not None:
        places: list[Where | None] = [named]
    else:
        folder = find_folder(path, {})
        inner = memory_folder(folder)
        places = [folder, inner / BASE, read_config(inner).base_model]
    tried = []
    for place in places:
        if place is None or (isinstance(place, Path) and not place.is_dir()):
            continue
        try:
            # Of an mplus model: its config names no tokenizer class, so the files must.
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            tried.append(f"{place} ({str(error).splitlines()[0]})")
    raise CheckpointError(
        f"{path} must have a tokenizer with it, or be told where one is (tokenizer=), tried {'; '.join(tried)}"
    )


def load_tokenizer(folder: Where) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies in a folder, without a decoder.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder} must have a tokenizer in it, which cannot be loaded: {first}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers load and save without progress bars meanwhile: for a megabyte they only flicker."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
