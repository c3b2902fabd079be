"""StaticReader: tokens behind a memory from a plain decoder and a static cache, which ``torch.compile`` takes whole."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from attrs import define
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mplus.backends.base import Segment
from mplus.errors import InputError, MemoryMismatchError, NotSupported
from mplus.hf.adapters.lora import AdaptedProjection, adapted_projections
from mplus.hf.adapters.peft_layers import is_adapter_layer
from mplus.hf.adapters.tensor_group import Mark, TensorGroup
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.installed import WrappedModel
from mplus.hf.pretrained.unwrap_copy import plain_decoder
from mplus.hf.reading.reading import Reading
from mplus.hf.retrofit.context import with_merged
from mplus.memory.memory import Memory


@define(eq=False)
class Prefilled:
    """The static cache that holds a prompt and its memory; changed by ``StaticReader.step``.

    Attributes:
        cache: per layer ``[memory | text | room]``.
        logits: ``[B, V]`` of the newest token.
        memory_rows: number of rows in front of the text.
        text_tokens: number of text tokens so far.
        moved: ``[B, 1]`` int64, by how many positions memory moves what follows; 0: by none.
    """

    cache: StaticCache
    logits: Tensor
    memory_rows: int
    text_tokens: int
    moved: Tensor | int = 0

    @property
    def room(self) -> int:
        """Number of tokens that there is still room for."""
        return cast("StaticLayer", self.cache.layers[0]).max_cache_len - self.memory_rows - self.text_tokens


class StaticReader:
    """Generates token by token without any code of mplus in the loop.

    The rows that a prompt retrieves are settled once the prompt has been read. So they go into a static cache of
    transformers, in front of the text, and a decoder of the original class goes on from there. It shares all weights
    with the wrapped decoder, except copies of those that the adapter for reading is merged into.

    ``torch.compile`` with ``fullgraph=True`` takes it, as it takes any decoder with a static cache, and CUDA graphs
    should: not run on a GPU yet. Rows of memory are copied once per prompt.

    Args:
        model: a wrapped decoder, in eval mode.
        compile_options: of ``torch.compile`` for the step; None: it is not compiled.

    Attributes:
        decoder: the decoder of the original class. Change no weight of the wrapped one while this is in use.

    Raises:
        NotSupported: with the reasons; among them layers without memory, sliding windows, ALiBi, adapters of your own,
            quantised weights under an adapter.

    Example:
        >>> reader = mplus.StaticReader(model)  # compiled with, say, {"mode": "reduce-overhead", "fullgraph": True}
        >>> state = reader.prefill(prompt, memory=memory, room=4)
        >>> while state.room:
        ...     logits = reader.step(state, state.logits.argmax(-1, keepdim=True))
        >>> state.text_tokens - prompt.shape[1]
        4
    """

    def __init__(self, model: WrappedModel, compile_options: Mapping[str, Any] | None = None) -> None:
        reasons = reasons_against(model)
        if reasons:
            raise NotSupported(f"{type(model).__name__} cannot read from a static cache: {'; '.join(reasons)}")
        self._model, self._weights = model, model.mplus_engine.watch.look()
        self.decoder, self._merged = running_decoder(model, model.mplus_engine.adapter("read")), merged_weights(model)
        self._projections = merged_projections(model, self.decoder)
        self._call: Callable[..., CausalLMOutputWithPast] = self.decoder
        if compile_options is not None:
            self._call = torch.compile(self.decoder, **compile_options)

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, *, memory: Memory, room: int = 256, into: Prefilled | None = None
    ) -> Prefilled:
        """Read a prompt as ``model(input_ids, memory=memory)`` does.

        Args:
            input_ids: ``[B, T]`` int64 without padding, one row per stream of the memory.
            memory: what is read.
            room: further tokens to keep room for; with ``into`` there is what its cache has left.
            into: the state of an earlier prompt that is not needed any more: its cache is used again, so that a
                compiled step stays valid. Memory and prompt together must fit into it.

        Raises:
            InputError: the prompt does not fit ``into``, or ``room`` is negative.
            NotSupported: the decoder's cache keeps something else than keys and values (multi-head latent attention),
                or streams have rows of different number.
            MemoryMismatchError: as a read, or the weights have changed since this reader was made.
        """
        model = self._model
        if room < 0:
            raise InputError(f"room must be at least 0 tokens, got {room}")
        now = model.mplus_engine.watch.look()
        if now.weights != self._weights.weights or merged_weights(model) != self._merged:
            raise MemoryMismatchError(
                "the decoder's weights have changed since this StaticReader was made: make another"
            )
        if now.acting:
            raise MemoryMismatchError(
                f"this StaticReader was made when no adapter of yours acted, now {list(now.acting)} do: switch them "
                "off, or generate with the decoder itself"
            )
        with with_merged(model, self._projections):
            output = model(input_ids, memory=memory, use_cache=True, logits_to_keep=1)
        reading: Reading = output.past_key_values._mplus_reading
        parts = [_joined(reading, index, layer) for index, layer in enumerate(output.past_key_values.layers)]
        keys = parts[0][0]
        rows = keys.shape[2] - input_ids.shape[1]
        if into is None:
            cache = StaticCache(config=self.decoder.config, max_cache_len=keys.shape[2] + room)
        else:
            cache = into.cache
            _check_fits(cache, keys)
            cache.reset()
        for index, (keys, values) in enumerate(parts):
            cache.update(keys, values, index)
        return Prefilled(
            cache, output.logits[:, -1].clone(), rows, input_ids.shape[1], moved_by_memory(reading, input_ids.device)
        )

    @torch.no_grad()
    def step(self, state: Prefilled, ids: Tensor) -> Tensor:
        """Read one more token per row, ``[B, 1]`` int64, and return the logits ``[B, V]`` of what follows.

        Raises:
            InputError: there is no room left, or not one token per row.
        """
        if tuple(ids.shape) != (state.logits.shape[0], 1):
            raise InputError(f"ids must be [{state.logits.shape[0]}, 1], one token per row, got {list(ids.shape)}")
        if not state.room:
            raise InputError("there is no room for another token: prefill with a larger room")
        # Text counts from 0, wherever it lies in the cache, but for positions that memory takes from it.
        place = torch.full_like(ids, state.text_tokens) + state.moved
        output = self._call(input_ids=ids, position_ids=place, past_key_values=state.cache, use_cache=True)
        state.logits, state.text_tokens = cast("Tensor", output.logits)[:, -1].clone(), state.text_tokens + 1
        return state.logits


def reasons_against(model: WrappedModel) -> list[str]:
    """Return why a plain decoder with a static cache would not do what ``model`` does; empty when it does."""
    engine: DecoderEngine | None = getattr(model, "mplus_engine", None)
    if engine is None:
        return ["it is not wrapped"]
    if engine.writes_text:
        return [f"memories of the mechanism {engine.mechanism.name!r} are made of text, which is read with the prompt"]
    reasons = []
    retrofit, anatomy = engine.retrofit, engine.retrofit.anatomy
    if retrofit.technique != "attention":
        reasons.append("it computes attention by itself, and memory is put into its cache at every token")
    mechanism = engine.mechanism
    own = {"computes attention in its own way": mechanism.attends}
    own["changes the final hidden state of every token"] = mechanism.finishes
    reasons += [f"the memory {mechanism.name!r} {what}" for what, does in own.items() if does]
    if retrofit.positions.offset:
        reasons.append("its positions depend on the length of what is read")
    if anatomy.hybrid:
        reasons.append(f"{len(anatomy.layers) - len(anatomy.specs)} of its layers carry no memory")
    if anatomy.alibi:
        reasons.append("it has an ALiBi bias, which would count memory as text")
    if model.training:
        reasons.append("it is in training mode: use model.eval()")
    return reasons + reasons_against_decoder(model)


def reasons_against_decoder(model: WrappedModel) -> list[str]:
    """Return why a plain decoder would not step a text as ``model`` does, apart from how it reads a memory."""
    reasons = []
    kinds = {type(layer) for layer in StaticCache(config=model.config, max_cache_len=1).layers}
    if kinds != {StaticLayer}:
        reasons.append(f"its static cache has layers of other kinds ({', '.join(sorted(k.__name__ for k in kinds))})")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        reasons.append("accelerate moves its weights about")
    if any(map(is_adapter_layer, model.modules())):
        reasons.append("it has adapters of your own: merge them before mplus.wrap")
    if any(not projection.weight.is_floating_point() for projection in adapted_projections(model)):
        reasons.append("weights that adapters belong to are quantised, so that nothing can be merged into them")
    return reasons


def running_decoder(model: WrappedModel, adapter: str | None) -> PreTrainedModel:
    """Return the decoder inside, fit to run: ``adapter`` of ours merged into copies, and no hook of ours."""
    decoder, tree = plain_decoder(model)
    copies = {original: path for path, original in tree.places.values()}
    for projection in adapted_projections(model):
        if adapter is not None:
            _merge(projection, adapter, decoder.get_submodule(copies[projection]))
    ours = {handle.id for handle in model.mplus_installed.hooks}
    for module in decoder.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            module.__dict__[name] = OrderedDict((k, v) for k, v in module.__dict__[name].items() if k not in ours)
    return decoder


def merged_projections(model: WrappedModel, decoder: PreTrainedModel) -> dict[nn.Module, nn.Module]:
    """Return the projection of ``running_decoder`` for each one of ``model`` that has adapters, for ``with_merged``."""
    return {
        module: decoder.get_submodule(name)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedProjection)
    }


def merged_weights(model: WrappedModel) -> tuple[Mark, Mark, tuple[float | None, ...]]:
    """Return marks of the weights that the plain decoder has copies of, and of the adapter merged into them."""
    projections, adapter = adapted_projections(model), model.mplus_engine.adapter("read")
    own = [(name, tensor) for one in projections for name, tensor in one.named_parameters() if f".{adapter}." in name]
    copied = TensorGroup([("weight", projection.weight) for projection in projections], sampled=True)
    return (
        copied.mark(),
        TensorGroup(own, sampled=False).mark(),
        tuple(one.scaling.get(str(adapter)) for one in projections),
    )


@torch.no_grad()
def _merge(projection: AdaptedProjection, adapter: str, twin: nn.Module) -> None:
    """Give ``twin`` a weight of its own with ``alpha / r * B A`` in it."""
    weight = projection.weight
    # The module's table of parameters is the wrapped decoder's too.
    twin.__dict__["_parameters"] = dict(twin._parameters)
    merged = weight + projection.update_weight(adapter).to(weight.dtype)
    twin._parameters["weight"] = nn.Parameter(merged, requires_grad=False)


def moved_by_memory(reading: Reading, device: torch.device) -> Tensor | int:
    """Return by how many positions memory moves what follows the prompts, ``[B, 1]`` int64; 0: by none."""
    opened = reading.need_opened()
    if opened.insertion is not None:
        return opened.insertion.rooms.sum(1, keepdim=True).to(device)
    return 0 if opened.text_offset is None else opened.text_offset[:, None].to(device)


def _joined(reading: Reading, index: int, layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[B, Hkv, P+T, D]`` of memory and text in one layer."""
    text_keys, text_values = cast("Tensor", layer.keys), cast("Tensor", layer.values)
    # No way of its own to attend, so these are segments: see reasons_against.
    segments = cast("tuple[Segment, ...]", reading.segments.get(index, ()))
    if any(segment.lengths is not None for segment in segments):
        raise NotSupported(
            "the streams of this memory have rows of different number, which a static cache has no mask for"
        )
    if any(segment.keys.shape[1::2] != text_keys.shape[1::2] for segment in segments):
        raise NotSupported(
            f"the cache of this decoder keeps {list(text_keys.shape)} per layer, something else than its keys"
        )
    batch = text_keys.shape[0]
    keys = [segment.keys.expand(batch, -1, -1, -1) for segment in segments]
    values = [segment.values.expand(batch, -1, -1, -1) for segment in segments]
    return torch.cat([*keys, text_keys], 2), torch.cat([*values, text_values], 2)


def _check_fits(cache: StaticCache, keys: Tensor) -> None:
    layer = cast("StaticLayer", cache.layers[0])
    rows = cast("Tensor", layer.keys).shape[:2]
    if rows != keys.shape[:2] or layer.max_cache_len < keys.shape[2]:
        raise InputError(
            f"into must have a cache of {keys.shape[0]} rows with room for {keys.shape[2]} keys, "
            f"got {rows[0]} rows with room for {layer.max_cache_len}"
        )
