"""``wrap`` and ``unwrap``: put memory on a decoder in place, and take it off again."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from attrs import evolve
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from peft import PeftModel

from mplus.backends import BACKENDS
from mplus.backends.choose import BackendChooser
from mplus.config import PUBLISHED, JsonValue, MPlusConfig
from mplus.errors import ConfigError, NotSupported
from mplus.hf.adapters.fingerprint import digest
from mplus.hf.adapters.lora import add_adapters, remove_adapters
from mplus.hf.cache_names import check_cache_name
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.installed import Installed, WrappedModel, decoder_inside, is_peft_model
from mplus.hf.model.model_class import memory_model_class
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.offloading import has_values, input_device
from mplus.hf.model.peft_model import PeftMemoryModel, peft_model_class
from mplus.hf.model.self_check import Check, check_ids, self_check
from mplus.hf.model.shape import decoder_shape
from mplus.hf.model.sizes import Room, chosen, resolve
from mplus.hf.pretrained.config import as_memory_config
from mplus.hf.reading import generation_config
from mplus.hf.retrofit import attention
from mplus.hf.retrofit.context import carry_memory, change_class, drop_memory
from mplus.hf.retrofit.discovery import discover
from mplus.hf.retrofit.hooks import AttentionHook, Retrofit, Technique, finish_pass
from mplus.hf.retrofit.positions import MemoryPositions
from mplus.hf.retrofit.projection import find_projection
from mplus.hf.text.wrapping import wrap_for_text
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.build import build_mechanism
from mplus.mechanisms.text.mechanism import TextMechanism

Layout = Literal["sequential", "compressed", "constant"]
Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger(__name__)

MOVING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the largest position."""
CAUSES = 3
"""Causes that a refusal names; the rest is in its details."""


def wrap(
    model: PreTrainedModel | PeftModel,
    config: MPlusConfig | Mapping[str, JsonValue] | str | Path | None = None,
    *,
    check: bool = True,
    pool: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """Give a decoder a memory, in place.

    Its class becomes a subclass of its own under the same name; with ``memory=None`` it computes what it computed
    before, bit for bit. The weights are not changed; the mechanism's own parameters (begin rows, mark and retriever of
    M+) and LoRA adapters are added. For memories of text ("notes") nothing is added and no layer is touched, so that
    every decoder can have them.

    Args:
        model: a ``PreTrainedModel`` with a causal language-model head, or a ``PeftModel`` around one. A ``PeftModel``
            that was put around a wrapped decoder, given without a config, only gets what one has that was wrapped:
            it saves the memory with its adapters, and prefix tuning works in ``forward``.
        config: sizes and implementations; also as plain data (``MPlusConfig.from_dict``), the path of a ``.json`` or
            ``.toml`` file, or a folder that ``save_pretrained`` wrote. Sizes that are left out are the published ones
            where half of the decoder's positions hold them, else smaller (``mplus.hf.model.sizes.resolve``).
        check: prove on a few tokens that reading and writing work; without it the first technique is taken on trust.
        pool: ``[L, N, d]`` short-term rows that every new memory starts from, where the mechanism has such rows.
        tokenizer: of all memories of the decoder that are given none, by ``new_memory``, ``Memory.load`` or
            ``Memory.open``. What the mechanism ``kv`` has to find out with one, by which chunks are compared, is found
            out now, and not when the first memory is made.

    Returns:
        ``model`` itself.

    Raises:
        NotSupported: the decoder cannot carry a memory; the message says why, and ``details`` has every finding. Or
            adapters of your own are merged into it, or have a name of ours, "write" or "read"; with ``adapters=None``
            in the config only ``save_pretrained`` refuses these. Or transformers is a release that cannot be read.
        ConfigError, UnknownNameError, PluginError: the config does not fit, or ``tokenizer`` is none.
        MechanismError: a method of the mechanism returned what it must not.

    Warns:
        MemorySizeWarning: sizes that are given need more positions than the decoder has.

    Example:
        ```python
        model = mplus.wrap(AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B"), tokenizer=tokenizer)
        memory = model.new_memory()
        memory.write("The key is under the blue stone.", source="garden")
        model.generate(**tokenizer("Where is the key?", return_tensors="pt"), memory=memory)
        ```
    """
    # A PeftModel put around a wrapped decoder: the decoder is as it should be, only the shell is not.
    if config is None and is_peft_model(model) and "mplus_installed" in model.get_base_model().__dict__:
        change_class(model, peft_model_class(getattr(type(model), "__mplus_base__", type(model))))
        return model
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}")
    check_cache_name()
    config = as_memory_config(config)
    decoder = _decoder(model)
    kind = MECHANISMS.get(config.mechanism.name)
    if issubclass(kind, TextMechanism):
        wrap_for_text(decoder, config, kind, check, pool)
    else:
        _wrap_for_rows(decoder, config, check, pool)
    if is_peft_model(model):
        change_class(model, peft_model_class(type(model)))
    if tokenizer is not None:
        try:
            cast("Any", decoder).new_memory(tokenizer=tokenizer)  # which finds out what it has to
        except BaseException:
            unwrap(model)
            raise
        cast("WrappedModel", decoder).mplus_engine.tokenizer = tokenizer
    return model


def _wrap_for_rows(decoder: PreTrainedModel, config: MPlusConfig, check: bool, pool: Tensor | None) -> None:
    """Let a decoder make and read memories of rows, in its layers; arguments and errors as of ``wrap``."""
    base_attention = decoder.config._attn_implementation or "eager"
    if base_attention not in attention.BASES:
        raise NotSupported(
            f"attn_implementation must be one of {', '.join(attention.BASES)}, got {base_attention!r}: "
            "load the model with attn_implementation='sdpa'"
        )
    BACKENDS.get(config.backend) if config.backend != "auto" else None
    anatomy = discover(decoder)
    # With ALiBi a distance of thousands of rows hides memory from every head.
    layout: Layout = "constant" if anatomy.alibi else "sequential"
    if config.memory_positions != "auto":
        layout = config.memory_positions
    positions = MemoryPositions(layout, config.position_span, offset=moving_rope(decoder))
    retrofit = Retrofit(anatomy, "attention", positions, BackendChooser(config.backend))
    asked = config
    sizes = MECHANISMS.get(config.mechanism.name).sizes
    if pool is not None and config.short_term_tokens is None and "short_term_tokens" in sizes:
        config = evolve(config, short_term_tokens=pool.shape[1])
    config = resolve(config, Room.of(decoder, positions, placed=not anatomy.learned_positions), stacklevel=3)
    ids = check_ids(cast("nn.Embedding", decoder.get_input_embeddings()).weight.shape[0], input_device(decoder))
    base_logits = _logits(decoder, ids) if check else None
    shape = decoder_shape(decoder, retrofit)
    mechanism = build_mechanism(config, shape, pool)
    installed = Installed(base_attention, digest(decoder, "base"), [], [], [], asked)
    wrapped = _install(decoder, DecoderEngine(decoder, config, retrofit, mechanism, shape), installed)
    try:
        if config.rope_inv_freq_dtype is not None:
            round_frequencies(decoder, getattr(torch, config.rope_inv_freq_dtype))
        _choose_technique(wrapped, installed, base_logits if config.rope_inv_freq_dtype is None else None, check)
        if mechanism.retriever is not None:
            wrapped.mplus_engine.attach(mechanism.retriever)
        _choose_rows(wrapped)
    # Also at an interrupt: a decoder that is wrapped halfway would read no memory and say nothing.
    except BaseException:
        unwrap(decoder)
        raise
    _say_sizes(wrapped, installed)


def _say_sizes(decoder: WrappedModel, installed: Installed) -> None:
    """Log the sizes that were left open; as a warning where the published ones do not fit."""
    sizes = chosen(installed.asked, decoder.mplus_config)
    if sizes:
        usual = decoder.mplus_engine.mechanism.sizes
        smaller = any(usual.get(name, size) != size for name, size in sizes.items())
        said = ", ".join(f"{name}={size}" for name, size in sizes.items())
        than = "published" if usual is PUBLISHED else "usual"
        logger.log(
            logging.WARNING if smaller else logging.INFO,
            "sizes of the memory of %s that were left out%s: %s",
            type(decoder).__name__,
            f", smaller than {than} so that it takes half of the decoder's positions" if smaller else "",
            said,
        )


def unwrap(model: Model) -> Model:
    """Take everything off that ``wrap`` put on, in place; memories made for the decoder no longer work.

    Returns:
        ``model`` itself.

    Raises:
        NotSupported: it is not wrapped.

    Example:
        ```python
        memory.save("memory")  # before: it cannot be read without the decoder it was made for
        model = mplus.unwrap(model)
        ```
    """
    if "mplus_installed" not in decoder_inside(model).__dict__:
        raise NotSupported(f"{type(model).__name__} is not wrapped by mplus.wrap")
    decoder = cast("WrappedModel", decoder_inside(model))
    engine, installed = decoder.mplus_engine, decoder.mplus_installed
    if not engine.writes_text:  # memories of text have touched no layer
        for handle in installed.hooks:
            handle.remove()
        for layer in engine.retrofit.anatomy.layers:
            drop_memory(layer)
        if engine.config.adapters is not None:
            remove_adapters(decoder)
        if engine.config.rope_inv_freq_dtype is not None:
            restore_frequencies(decoder)
        _use_attention(decoder, installed.base_attention)
        del decoder._modules["mplus"]
    generation_config.drop_memory(decoder)
    for name in ("mplus_engine", "mplus_installed"):
        del decoder.__dict__[name]
    change_class(decoder, type(decoder).__mplus_base__)
    if isinstance(model, PeftMemoryModel):
        change_class(model, type(model).__mplus_base__)
    return model


def _decoder(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    decoder = decoder_inside(model)
    name = type(decoder).__name__
    if not isinstance(decoder, PreTrainedModel) or not decoder.can_generate():
        raise NotSupported(f"wrap takes a transformers model with a causal language-model head, got {name}")
    if decoder.config.is_encoder_decoder:
        raise NotSupported(f"{name} is an encoder-decoder; mplus wraps decoders")
    if "mplus_installed" in decoder.__dict__:
        raise NotSupported(f"{name} is wrapped already: use mplus.unwrap first")
    if not has_values(decoder):
        raise NotSupported(
            f"{name} has weights on the meta device, which have no values: load it first, and wrap outside of "
            "accelerate's init_empty_weights"
        )
    return decoder


def moving_rope(decoder: PreTrainedModel) -> bool:
    """Return whether rotary frequencies depend on the largest position of a forward."""
    parameters = getattr(decoder.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    tables = [parameters, *(table for table in parameters.values() if isinstance(table, dict))]
    return any(table.get("rope_type") in MOVING_ROPE for table in tables)


@torch.no_grad()
def _logits(decoder: PreTrainedModel, ids: Tensor) -> Tensor:
    with in_eval_mode(decoder):
        logits: Tensor = decoder(input_ids=ids).logits
        return logits


def _install(decoder: PreTrainedModel, engine: DecoderEngine, installed: Installed) -> WrappedModel:
    anatomy = engine.retrofit.anatomy
    if engine.config.adapters is not None:
        add_adapters(decoder, anatomy, engine.config.adapters)  # first: it may refuse, and nothing has changed then
    memory_index = {spec.layer_index: spec.memory_index for spec in anatomy.specs}
    for index, layer in enumerate(anatomy.layers):
        carry_memory(layer, memory_index.get(index))
    for spec in anatomy.specs:
        hook = AttentionHook(engine.retrofit, spec)
        installed.hooks.append(spec.attention.register_forward_pre_hook(hook, with_kwargs=True))
    if engine.mechanism.finishes:
        installed.hooks.append(anatomy.decoder.register_forward_hook(finish_pass))
    decoder.add_module("mplus", engine.mechanism.additions)
    engine.mechanism.additions.train(decoder.training)
    change_class(decoder, memory_model_class(type(decoder)))
    decoder.__dict__["mplus_engine"] = engine
    decoder.__dict__["mplus_installed"] = installed
    return cast("WrappedModel", decoder)


def _use_attention(decoder: PreTrainedModel, implementation: str) -> None:
    if decoder.config._attn_implementation != implementation:
        PreTrainedModel.set_attn_implementation(decoder, implementation)  # a wrapped decoder's own keeps to ours


def _choose_technique(decoder: WrappedModel, installed: Installed, base_logits: Tensor | None, check: bool) -> None:
    """Try the techniques in order of preference; keep the first that passes its self-check."""
    engine = decoder.mplus_engine
    retrofit = engine.retrofit
    offsets = (True,) if retrofit.positions.offset else (False, True)
    interface = type(decoder)._can_set_attn_implementation()
    failed: list[Check] = []
    techniques: tuple[Technique, ...] = ("attention", "cache_view")
    for offset, technique in itertools.product(offsets, techniques):
        if technique == "attention" and not interface:
            continue
        if technique == "cache_view" and engine.mechanism.attends:
            installed.rejected.append(
                f"cache view: the memory {engine.mechanism.name!r} computes attention in its own way, and the decoder "
                "would attend by itself"
            )
            continue
        if technique == "cache_view" and engine.config.backend != "auto":
            installed.rejected.append(
                f"cache view: the decoder attends by itself, so backend {engine.config.backend!r} cannot run"
            )
            continue
        retrofit.technique = technique
        retrofit.positions = MemoryPositions(retrofit.positions.layout, retrofit.positions.span, offset)
        prefix = attention.PREFIX if technique == "attention" else ""
        _use_attention(decoder, prefix + installed.base_attention)
        if not check:
            return
        logits = (
            base_logits if base_logits is not None else _logits(decoder, check_ids(engine.vocab_size, engine.device))
        )
        installed.checks = self_check(decoder, logits) if (unkept := _unkept(decoder)) is None else [unkept]
        found = [one for one in installed.checks if not one.passed]
        if not found:
            return
        where = f"{technique.replace('_', ' ')}, {'offset' if offset else 'negative'} positions"
        installed.rejected.extend(f"{where}: {one}" for one in found)
        failed.extend(found)
    refusal = _refusal(type(decoder).__name__, failed, installed.rejected)
    raise refusal from next((one.failure for one in failed if one.failure is not None), None)


def _unkept(decoder: WrappedModel) -> Check | None:
    """Return why rows cannot be kept as the mechanism needs them; None where the checks can go on."""
    if "hidden" in decoder.mplus_engine.mechanism.keeps:
        return None  # what is kept of rows is settled after the checks
    try:
        _choose_rows(decoder)
    except NotSupported as error:
        return Check("rows are kept as keys and values", None, False, str(error))
    return None


def _refusal(name: str, failed: Sequence[Check], details: Sequence[str]) -> NotSupported:
    """Return the error that says each cause once, whatever number of techniques, checks and layers it stopped."""
    causes: dict[str, str] = {}
    for one in failed:
        raised = one.error is None  # what a decoder says has nothing to do with the check in which it says it
        cause = one.remark if raised else str(one)
        causes.setdefault(re.sub(r"\d+", "0", cause) if raised else one.name, cause)
    said = list(causes.values())[:CAUSES] or list(details)
    further = f"; {len(causes) - CAUSES} further reasons are in the error's details" if len(causes) > CAUSES else ""
    error = NotSupported(f"{name} cannot carry a memory: {'; '.join(said)}{further}")
    error.details = tuple(details)
    return error


@torch.no_grad()
def _choose_rows(decoder: WrappedModel) -> None:
    """Find out how rows can be kept. Raises NotSupported when the config asks for what cannot be had."""
    engine = decoder.mplus_engine
    begin = engine.shape.begin
    some = torch.randn(4, begin.shape[2], generator=torch.Generator().manual_seed(0)).to(begin)
    rows = [(some * (row.float().std() or 1.0)).to(begin)[None] for row in begin]
    try:
        with in_eval_mode(decoder):
            engine.projection = find_projection(engine.retrofit, engine.adapter("read"), rows)
    except Exception as error:  # noqa: BLE001 - whatever a foreign model does then, it works with hidden states
        engine.projection = f"trying to failed with {type(error).__name__}: {error}"
    engine.layout_of(engine.memory_rows)


def round_frequencies(decoder: nn.Module, dtype: torch.dtype) -> None:
    """Round rotary frequencies to ``dtype`` and back; released M+ checkpoints were trained that way."""
    found = 0
    for module in decoder.modules():
        for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]:
            frequencies = getattr(module, name)
            module.__dict__.setdefault("_mplus_frequencies", {})[name] = frequencies
            setattr(module, name, frequencies.to(dtype).to(frequencies.dtype))
            found += 1
    if not found:
        raise ConfigError(
            f"rope_inv_freq_dtype needs rotary embeddings with an inv_freq buffer; {type(decoder).__name__} has none"
        )


def restore_frequencies(decoder: nn.Module) -> None:
    """Undo ``round_frequencies``."""
    for module in decoder.modules():
        for name, frequencies in module.__dict__.pop("_mplus_frequencies", {}).items():
            setattr(module, name, frequencies)
