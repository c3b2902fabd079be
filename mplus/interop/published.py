"""Published M+ and MemoryLLM checkpoints: from a folder to a wrapped decoder and its memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.config import JsonValue, MPlusConfig
from mplus.errors import CheckpointError
from mplus.hf.adapters.lora import is_addition
from mplus.hf.decoders.published_model import empty_llama, fill, finish
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.model.wrapping import wrap
from mplus.interop.names import LTM, Place, places, unused
from mplus.interop.published_config import PublishedConfig, RopeDtype
from mplus.interop.tensors import WEIGHTS, TensorFiles
from mplus.memory.memory import Memory
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.tokenizer import Tokenizer


def load_published(path: str | Path, **options: Any) -> tuple[MemoryModel, Memory]:
    """Load a published M+ or MemoryLLM checkpoint: ``PublishedCheckpoint.open(path).load(**options)``."""
    return PublishedCheckpoint.open(path).load(**options)


@define(frozen=True, eq=False)
class PublishedCheckpoint:
    """A checkpoint folder whose configuration and tensors were found to fit together; nothing is loaded yet.

    Attributes:
        folder: where it lies.
        config: what its ``config.json`` says.
        files: its tensors.
        places: where each tensor belongs.
        ignored: tensors that take no part in writing or reading.
        long_term_rows: rows of long-term memory per layer; empty for MemoryLLM.
        initialized: whether the short-term pool holds memory (a MemoryLLM may come without).
    """

    folder: Path
    config: PublishedConfig
    files: TensorFiles
    places: Mapping[str, Place]
    ignored: tuple[str, ...]
    long_term_rows: tuple[int, ...]
    initialized: bool

    @classmethod
    def open(cls, path: str | Path, weights: str = WEIGHTS) -> PublishedCheckpoint:
        """Read ``config.json`` and the headers of the weight files, and check them against each other.

        Raises:
            CheckpointError: a key or tensor is missing, unknown, or contradicts another; the message names it, its rule
                and its value.
        """
        folder = Path(path)
        config = PublishedConfig.from_file(folder / "config.json")
        files = TensorFiles.open(folder, weights)
        model = empty_llama(config.decoder)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        decoder = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied}
        wanted = places(config, decoder)
        foreign = [name for name in files if name not in wanted]
        if config.kind == "mplus" and "initialized" in foreign:  # a remainder of training, where it may be 0
            foreign.remove("initialized")
            _initialized(files, must=True)
        ignored = unused(foreign, decoder)
        _check(files, wanted, [name for name in foreign if name not in ignored])
        rows: tuple[int, ...] = ()
        if config.kind == "mplus":
            rows = tuple(_long_term_rows(files, layer) for layer in range(config.layers))
        initialized = config.kind == "mplus" or _initialized(files)
        return cls(folder, config, files, wanted, tuple(ignored), rows, initialized)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the decoder's embedding is stored."""
        dtype = self.files.dtype("model.embed_tokens.weight")
        if dtype is None:
            raise CheckpointError("model.embed_tokens.weight must be stored as floating-point numbers")
        return dtype

    def load(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        memory_device: torch.device | str | None = None,
        rope_inv_freq_dtype: RopeDtype = "default",
        config: Mapping[str, JsonValue] | None = None,
        attn_implementation: str = "sdpa",
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        check: bool = True,
    ) -> tuple[MemoryModel, Memory]:
        """Build the wrapped decoder and its memory, tensor by tensor.

        Besides what is returned, no more than one tensor of the checkpoint is held at a time.

        Args:
            dtype: of weights and memory; default: as stored.
            device: where the decoder goes.
            memory_device: where the memory's rows go; default: with the decoder.
            rope_inv_freq_dtype: round the rotary frequencies to this dtype, None: do not; "default": bfloat16 for M+
                (its published numbers come from rounded frequencies), None for MemoryLLM.
            config: values for fields of ``MPlusConfig`` that the checkpoint leaves open, such as ``backend`` or
                ``chunk_tokens`` (``published_config.OPEN_FIELDS``).
            attn_implementation: attention of the decoder, as in transformers.
            tokenizer: lets ``Memory.write`` take text.
            seed: of the generator that draws the rows that leave the short-term memory.
            check: run the self-check of ``mplus.wrap``.

        Returns:
            The wrapped decoder in eval mode, variant "published", and a memory of batch size 1 with the checkpoint's
            rows, keys, ages and recall frequencies.

        Raises:
            CheckpointError: a tensor cannot be read or holds impossible ages or frequencies.
            ConfigError: ``config`` does not fit.
        """
        dtype = self.dtype if dtype is None else dtype
        device = torch.device(device)
        memory_config = self.config.memory_config(rope_inv_freq_dtype, config)
        decoder = empty_llama(self.config.decoder, dtype=dtype, attn_implementation=attn_implementation)
        for name, place in self.places.items():
            if place.base:
                fill(decoder, place.ours, self.files.read(name), device)
        finish(decoder, self.folder, device)
        model = self._wrap(decoder, memory_config, dtype, device, check)
        memory = model.new_memory(tokenizer=tokenizer, seed=seed, device=memory_device)
        for layer in range(len(self.long_term_rows)):
            # Nobody else has this memory yet, so its store may be filled directly.
            memory.stores[0].append(layer, self._long_term(layer, dtype))
        return model, memory

    def _wrap(
        self, decoder: Any, config: MPlusConfig, dtype: torch.dtype, device: torch.device, check: bool
    ) -> MemoryModel:
        pool = None
        if self.initialized:
            pool = torch.empty(self.files.shape("memory"), dtype=dtype, device=device)
            pool.copy_(self.files.read("memory"))
        model: MemoryModel = wrap(decoder, config, check=check, pool=pool)
        added = {name: place for name, place in self.places.items() if place.ours and not place.base}
        with torch.no_grad():
            for name, place in added.items():
                model.get_parameter(place.ours).copy_(self.files.read(name))
        left = {name for name, _ in model.named_parameters() if is_addition(name)}
        left -= {place.ours for place in added.values()}
        if left:
            raise CheckpointError(
                f"the checkpoint must have a counterpart of {min(left)}, which the wrapped decoder trains"
            )
        return model

    def _long_term(self, layer: int, dtype: torch.dtype) -> MemoryRows:
        """Return the stored rows of a layer. Births count back from a clock of 0; expiry counts merges from now on."""
        rows, keys, ages, frequencies = (self.files.read(f"{name}.{layer}") for name in LTM)
        for name, column in (("ltm_ages", ages), ("ltm_recall_frequencies", frequencies)):
            wrong = ~torch.isfinite(column) | (column < 0 if name == "ltm_ages" else torch.zeros_like(column).bool())
            if bool(wrong.any()):
                rule = "numbers of at least 0" if name == "ltm_ages" else "finite numbers"
                raise CheckpointError(f"{name}.{layer} must hold {rule}, got {float(column[wrong][0])}")
        return MemoryRows(
            hidden=rows.to(dtype),
            birth=-1 - ages.to(torch.int64),
            source=torch.full((len(rows),), NO_SOURCE, dtype=torch.int64),
            key=keys.to(dtype),
            expiry=frequencies.to(torch.float64),
        )


def _check(files: TensorFiles, wanted: Mapping[str, Place], foreign: Iterable[str]) -> None:
    """Raises CheckpointError unless exactly the tensors ``wanted`` are there, with their shapes, as floats."""
    for name, place in wanted.items():
        if name not in files:
            # A projection may be there with LoRA where it should have none, or the other way round.
            base = ".base_layer" in name
            other = name.replace(".base_layer", "") if base else name.replace(".weight", ".base_layer.weight")
            there = other != name and other in files
            hint = f" (but there is {other}: see lora_config.target_modules)" if there else ""
            raise CheckpointError(f"the checkpoint must have {name} of shape {_shape(place)}, which is missing{hint}")
        shape = files.shape(name)
        if len(shape) != len(place.shape) or any(
            size not in (None, given) for size, given in zip(place.shape, shape, strict=True)
        ):
            raise CheckpointError(f"{name} must have shape {_shape(place)} by config.json, got {list(shape)}")
        if files.dtype(name) is None and name != "initialized":
            raise CheckpointError(
                f"{name} must be stored as floating-point numbers: quantised checkpoints cannot be loaded"
            )
    for name in foreign:
        raise CheckpointError(f"the checkpoint must not have a tensor {name}, which has no place in it by config.json")


def _shape(place: Place) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in place.shape) + "]"


def _long_term_rows(files: TensorFiles, layer: int) -> int:
    counts = {f"{name}.{layer}": files.shape(f"{name}.{layer}")[0] for name in LTM}
    rows = counts[f"ltm.{layer}"]
    for name, count in counts.items():
        if count != rows:
            raise CheckpointError(f"{name} must have as many rows as ltm.{layer} ({rows}), got {count}")
    return rows


def _initialized(files: TensorFiles, must: bool = False) -> bool:
    value: Tensor = files.read("initialized")
    if value.numel() != 1 or value.item() not in ((1,) if must else (0, 1)):
        raise CheckpointError(f"initialized must be {'1' if must else '0 or 1'}, got {value.tolist()}")
    return bool(value.item())
