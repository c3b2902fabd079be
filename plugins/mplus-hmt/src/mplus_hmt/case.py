"""HMTCase: one golden trace of HMT on disk, and decoders with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from attrs import define, field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import mplus
from mplus.config import JsonValue
from mplus.errors import CheckpointError
from mplus.interop.golden import STEPS, read_json

CONFIG, WEIGHTS, TENSORS = "config.json", "state_dict.safetensors", "trace.safetensors"
BACKBONE = "memory_cell.model."
OWN = {
    "mplus.topic": "mem",
    "mplus.first": "memory_cell.memory",
    "mplus.query.weight": "cross_attn.wq.weight",
    "mplus.key.weight": "cross_attn.wk.weight",
}
"""Parameters that HMT adds: our name and the published one."""


@define(frozen=True, eq=False)
class Step:
    """One recorded call of the published code, with what it names in the place of names.

    Attributes:
        index, kind: its place, and what was called.
        args: settings, by name.
        inputs, outputs: tensors and numbers, by name.
        segments: of a forward, the same for each segment.
    """

    index: int
    kind: str
    args: Mapping[str, Any]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    segments: Sequence[Mapping[str, Any]] = ()


@define(frozen=True, eq=False)
class HMTCase:
    """A golden trace.

    Attributes:
        folder: where it lies.
        sizes: the memory's (``hmt`` in ``config.json``).
        backbone: configuration of the decoder.
        weights: all, under the published names.
        steps: in order.
    """

    folder: Path
    sizes: Mapping[str, int]
    backbone: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    steps: Sequence[Step] = field(factory=tuple)

    @staticmethod
    def read(folder: Path) -> HMTCase:
        """Read a case. Raises CheckpointError where a file or an entry is missing or damaged."""
        try:
            weights, tensors = (load_file(folder / name) for name in (WEIGHTS, TENSORS))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} must hold complete {WEIGHTS} and {TENSORS}: {error}") from error
        config, plain = read_json(folder / CONFIG), read_json(folder / STEPS)
        try:
            steps = [_step(one, tensors) for one in cast("Sequence[Any]", plain["steps"])]
            sizes, backbone = (cast("Mapping[str, Any]", config[name]) for name in ("hmt", "backbone"))
            return HMTCase(folder, sizes, backbone, weights, steps)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} must be a golden trace of HMT, and lacks {error}") from error

    def decoder(self, backend: str, dtype: torch.dtype, **options: JsonValue) -> Any:
        """Return the published decoder, wrapped with its memory; ``options`` are those of the mechanism."""
        from transformers import AutoConfig, AutoModelForCausalLM  # naming a player needs no transformers

        config = AutoConfig.for_model(**self.backbone)
        attention = "eager" if backend == "reference" else "sdpa"
        decoder = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
        named = {name.removeprefix(BACKBONE): w for name, w in self.weights.items() if name.startswith(BACKBONE)}
        found = decoder.load_state_dict(named, strict=False)
        if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
            raise CheckpointError(f"{self.folder / WEIGHTS} does not fit the decoder of {CONFIG}: {found}")
        sizes = self.sizes
        model = mplus.wrap(
            decoder,
            mplus.MPlusConfig(
                mechanism={
                    "name": "hmt",
                    "sensory_tokens": sizes["num_sensory"],
                    "recall_width": sizes["recall_hidden_dim"],
                    "recall_dtype": None,  # the traces' recall computed in float32, but for one step
                    **options,
                },
                variant="published",
                chunk_tokens=sizes["segment_size"],
                long_term_tokens=sizes["ltm_context"],
                backend=backend,
            ),
        )
        own = dict(model.named_parameters())
        with torch.no_grad():
            for ours, published in OWN.items():
                if ours in own:
                    own[ours].copy_(self.weights[published])
        model.generation_config.eos_token_id = None  # the published code decoded on, whatever came
        model.generation_config.pad_token_id = 0
        return model


def published_name(name: str) -> str:
    """Return what the published code calls a parameter of a wrapped decoder."""
    return OWN.get(name, BACKBONE + name)


def _step(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Step:
    def resolved(value: Any) -> Any:
        if isinstance(value, str):
            return tensors[value]
        if isinstance(value, dict):
            return {name: resolved(one) for name, one in value.items()}
        return value

    inputs, outputs = resolved(plain["inputs"]), resolved(plain["outputs"])
    segments = [resolved(one) for one in plain.get("segments") or ()]
    return Step(plain["index"], plain["kind"], plain["args"], inputs, outputs, segments)
