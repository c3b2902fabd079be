"""WrappedDecoder: passes of a wrapped decoder, as the mechanism of its memories asks for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, cast, get_args

import torch
from attrs import define, evolve
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mplus.backends.base import Segment
from mplus.errors import InputError, NotSupported
from mplus.hf.adapters.fingerprint import digest
from mplus.hf.retrofit.attention_probe import Nothing
from mplus.hf.retrofit.context import Collection as Collecting
from mplus.hf.retrofit.context import Pass, PrefixSource, run_in
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.hooks import Retrofit
from mplus.hf.retrofit.placement import Placement
from mplus.hf.retrofit.positions import Rotation
from mplus.hf.retrofit.projection import rotation_of
from mplus.hf.text.ask import ask
from mplus.hf.types import DecoderOutput
from mplus.mechanisms.decoder import (
    Adapter,
    Attended,
    Collected,
    DecoderShape,
    Edit,
    Finish,
    KeptProjection,
    PassResult,
    Prefix,
    Project,
)
from mplus.mechanisms.opened import Insertion
from mplus.tokenizer import Tokenizer


class Wrapped(Protocol):
    """The parts of ``DecoderEngine`` that passes need."""

    model: PreTrainedModel
    retrofit: Retrofit
    shape: DecoderShape

    @property
    def embedding(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def hidden_dtype(self) -> torch.dtype: ...
    @property
    def vocab_size(self) -> int: ...
    def need_projection(self) -> KeptProjection: ...
    def project_in(self, layer: int, hidden: Tensor) -> Tensor: ...
    def keys_in(self, layer: int, hidden: Tensor) -> Tensor | None: ...
    def adapter(self, wanted: str) -> str | None: ...
    def check_wrapped(self) -> None: ...
    def check_attention(self) -> None: ...


class WrappedDecoder:
    """A wrapped decoder as the mechanism of its memories sees it: ``mplus.mechanisms.decoder.Decoder``."""

    def __init__(self, engine: Wrapped) -> None:
        self._engine = engine
        self._rotations: dict[int, Rotation | str] = {}

    @property
    def shape(self) -> DecoderShape:
        engine = self._engine
        return evolve(engine.shape, vocab_size=engine.vocab_size, dtype=engine.hidden_dtype, device=engine.device)

    @property
    def kept(self) -> KeptProjection:
        return self._engine.need_projection()

    @property
    def weights(self) -> str:
        return digest(self._engine.model, "base") + digest(self._engine.model, "lora")

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self._engine.embedding(ids)
        return found

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        return self._engine.project_in(layer, hidden)

    def rotated(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        retrofit, shape = self._engine.retrofit, self._engine.shape
        if layer not in self._rotations:
            self._rotations[layer] = rotation_of(retrofit, layer, shape.begin_inputs[layer][None])
        rotation = self._rotations[layer]
        if isinstance(rotation, str):
            raise NotSupported(f"queries and keys cannot be turned further: {rotation}")
        tables = rotation.tables(retrofit.anatomy.specs[layer], heads[:, 0], positions[None])
        return rotation.apply(heads, tables, torch.empty_like(heads))

    def normed(self, layer: int, hidden: Tensor) -> Tensor:
        norm = self._engine.retrofit.anatomy.specs[layer].norm
        found: Tensor = hidden if norm is None else norm(hidden)
        return found

    def keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        return self._engine.keys_in(layer, hidden)

    def ask(
        self, tokenizer: Tokenizer, prompt: str, tokens: int, stop: Sequence[str] = (), choices: Sequence[str] = ()
    ) -> str:
        self._engine.check_wrapped()
        known = cast("PreTrainedTokenizerBase", tokenizer)
        return ask(self._engine.model, known, prompt, tokens, stop, choices)

    @torch.compiler.disable  # as for reading
    def run(
        self,
        text: Tensor,
        *,
        prefix: Prefix | None = None,
        prefix_rows: int = 0,
        edit: Edit | None = None,
        adapter: Adapter | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        collect: Collection[Collected] = (),
        last: int | None = None,
        logits_to_keep: int = 0,
        finish: Finish | None = None,
        insertion: Insertion | None = None,
    ) -> PassResult:
        engine = self._engine
        engine.check_wrapped()
        engine.check_attention()
        offset = engine.retrofit.positions.extent(prefix_rows) if engine.retrofit.positions.offset else 0
        batch, tokens = text.shape[:2]
        placement: Placement | None = None
        text_offset: int | Tensor = offset
        if insertion is not None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=text.device) if mask is None else mask.bool()
            placement = Placement(insertion, Placement.starts_of(insertion, real, 0), tokens, tokens)
            positions = (real.cumsum(1) - 1).clamp(min=0) + placement.moved(batch).to(text.device)
            text_offset = insertion.rooms.sum(1, keepdim=True).to(text.device)
            if placement.divides:  # without a mask transformers takes a gap between positions for another text
                mask = real.long()
        elif positions is None and offset:
            positions = torch.arange(offset, offset + tokens, device=text.device)
        inputs: dict[str, Tensor | bool | int] = {
            "input_ids" if text.dim() == 2 else "inputs_embeds": text,
            "use_cache": False,
        }
        most = engine.shape.max_positions if engine.shape.positions == "learned" else None
        if positions is not None and most is not None and int(positions.max()) >= most:
            raise InputError(
                f"{type(engine.model).__name__} has {most} learned positions, and {tokens} tokens behind "
                f"{int(positions.min())} rows of memory need {int(positions.max()) + 1}: use shorter chunks, or write "
                "them behind fewer others"
            )
        if positions is not None:
            inputs["position_ids"] = positions.expand(batch, -1)
        if mask is not None:
            inputs["attention_mask"] = mask
        names = frozenset(collect)
        _check_names(names, adapter)
        collection = Collecting(names | {"inputs"} if "projected" in names else names, last)
        source: PrefixSource = Nothing() if prefix is None else _Given(prefix)
        named = None if adapter is None else engine.adapter(adapter)
        active = Pass(source, named, edit, collection, finish, text_offset, placement)
        if "logits" not in names:
            output: DecoderOutput = run_in(active, engine.retrofit.anatomy.decoder, **inputs)
            return self._result(collection.result(output.last_hidden_state), names)
        if logits_to_keep:
            inputs["logits_to_keep"] = logits_to_keep
        if "hidden" in names:
            inputs["output_hidden_states"] = True  # the last one is the only way to the final norm's
        output = run_in(active, engine.model, **inputs)
        states = output.hidden_states if "hidden" in names else None
        return self._result(evolve(collection.result(states[-1] if states else None), logits=output.logits), names)

    def _result(self, found: PassResult, names: frozenset[Collected]) -> PassResult:
        if "projected" not in names:
            return found
        projected = tuple(self.project(layer, rows) for layer, rows in enumerate(found.inputs))
        return evolve(found, projected=projected, inputs=found.inputs if "inputs" in names else ())


def _check_names(collect: frozenset[str], adapter: str | None) -> None:
    """Raise InputError unless a pass can collect what is named, and run with this adapter."""
    if unknown := sorted(collect - set(get_args(Collected))):
        raise InputError(f"collect must name some of {', '.join(get_args(Collected))}, got {unknown[0]!r}")
    if adapter is not None and adapter not in get_args(Adapter):
        raise InputError(f"adapter must be 'write', 'read' or None, got {adapter!r}")


@define(frozen=True, eq=False)
class _Given:
    """A ``PrefixSource`` that asks a function by the number of the layer."""

    given: Prefix

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> tuple[Segment, ...] | Attended | None:
        return self.given(spec.memory_index, hidden, project)
