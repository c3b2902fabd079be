"""The class of a wrapped decoder: the decoder's own, whose ``forward`` and ``generate`` also take ``memory``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mplus.config import Component, MPlusConfig
from mplus.errors import MemoryMismatchError, NotSupported
from mplus.hf import attention
from mplus.hf.engine import DecoderEngine
from mplus.hf.modes import with_attention
from mplus.hf.passes import Pass, rebuild, running, subclass
from mplus.hf.reading import Reading
from mplus.memory.memory import Memory

_GENERATING: ContextVar[tuple[Any, Reading] | None] = ContextVar("mplus_generating", default=None)
"""The model and reading of the generation this thread is in: inner forwards use it, other models do not see it."""


class MemoryModel:
    """Mixed into a wrapped decoder's class."""

    mplus_engine: DecoderEngine
    mplus_installed: Any

    @property
    def mplus_config(self) -> MPlusConfig:
        """The memory configuration this decoder was wrapped with."""
        return self.mplus_engine.config

    def new_memory(
        self,
        batch_size: int = 1,
        *,
        tokenizer: Any = None,
        seed: int = 0,
        store: Any = None,
        eviction: Any = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """A new memory for this decoder.

        Args:
            batch_size: number of independent streams.
            tokenizer: lets ``Memory.write`` take text.
            seed: stream i draws the rows that leave its STM from a generator seeded with ``seed + i``.
            store, eviction: override the config, as a name or ``{"name": ..., option: value}``.
            device: where the rows are kept; default: where the decoder's embedding is.

        Raises:
            ConfigError: a batch size below 1, or a bad option.
            UnknownNameError: no such store or eviction policy.
        """
        from mplus.hf.build import new_memory

        return new_memory(
            self.mplus_engine, batch_size, tokenizer, seed, _component(store), _component(eviction), device
        )

    def generate(
        self,
        *args: Any,
        memory: Memory | None = None,
        retrieve_every: int | None = None,
        output_sources: bool = False,
        reuse_memory_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``generate`` of the decoder, reading ``memory`` as it is at the call.

        Args:
            memory: one stream per prompt; None: the decoder alone.
            retrieve_every: besides once per prompt, retrieve anew after so many generated tokens.
            output_sources: with ``return_dict_in_generate=True``, the result gets ``memory_sources``: for every batch
                row and memory layer the retrieved rows (``mplus.hf.sources.RetrievedSource``).
            reuse_memory_cache: accept ``past_key_values`` made under an older state of the memory, and read that one.

        Raises:
            NotSupported: a way of generating that memory cannot follow; the message names it.
            MemoryMismatchError: batch sizes, model or cache do not fit the memory.
        """
        from mplus.hf.generation import generate

        base_generate = super().generate  # type: ignore[misc]
        return generate(self, base_generate, memory, retrieve_every, output_sources, reuse_memory_cache, args, kwargs)

    def generate_batch(self, *args: Any, memory: Memory | None = None, **kwargs: Any) -> Any:
        """As in transformers: continuous batching, for the decoder alone. Raises NotSupported with a memory."""
        if memory is not None:
            raise NotSupported(
                "generate_batch (continuous batching) keeps keys and values of many texts in pages and leaves no place "
                "for memory in front of a text: use generate"
            )
        with with_attention(self, self.mplus_installed.base_attention):
            return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, within ``generate_batch``. Raises NotSupported otherwise: a manager outlives the call."""
        if self.config._attn_implementation.startswith(attention.PREFIX):  # type: ignore[attr-defined]
            raise NotSupported(
                "continuous batching in a wrapped decoder goes through generate_batch; or use mplus.unwrap first"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; with others than "eager" and "sdpa" memory is refused from then on."""
        wanted = attn_implementation
        if wanted in attention.BASES and self.mplus_engine.retrofit.technique == "attention":
            self.mplus_installed.base_attention = wanted
            wanted = attention.PREFIX + wanted
        super().set_attn_implementation(wanted, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        *,
        save_base: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save what mplus added (adapters and additions) with a config and a model card.

        Args:
            save_directory: folder; made where missing.
            is_main_process, state_dict, push_to_hub: as in transformers. Adapters of the user are not saved.
            save_base: save the decoder too, in ``base/``, where transformers can load it without mplus.
            kwargs: for saving the decoder (``max_shard_size`` and so on) and for the Hub (``repo_id`` and so on).

        Raises:
            NotSupported: ``distributed_checkpoint`` was asked for.
        """
        from mplus.hf.saving import save_pretrained

        save_pretrained(self, save_directory, is_main_process, state_dict, push_to_hub, save_base, kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_base: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Save as ``save_pretrained`` does and upload that, with its model card; arguments as in transformers."""
        from mplus.hf.saving import push_to_hub

        hub = {"private": private, "token": token, "create_pr": create_pr, "revision": revision}
        hub.update(commit_message=commit_message, commit_description=commit_description)
        return push_to_hub(self, repo_id, save_base, hub, {"max_shard_size": max_shard_size, "tags": tags})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (memory_model_class, type(self).__mplus_base__), self.__dict__  # type: ignore[attr-defined]


def _component(value: Any) -> Component | None:
    return None if value is None else Component.of(value)


def memory_model_class(base: type) -> type:
    """``base`` with ``MemoryModel`` mixed in and ``memory`` in the signature of ``forward``."""
    attention.register()  # here, since a model of this class may come out of a pickle in a new process

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any, *args: Any, memory: Memory | None = None, reuse_memory_cache: bool = False, **kwargs: Any
    ) -> Any:
        return _forward(self, base, memory, reuse_memory_cache, args, kwargs)

    signature = inspect.signature(base.forward)  # type: ignore[attr-defined]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (("memory", None), ("reuse_memory_cache", False))
    ]
    parameters = list(signature.parameters.values())
    at = len(parameters) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    # generate() checks keywords, and Trainer drops data columns, by this signature.
    forward.__signature__ = signature.replace(parameters=[*parameters[:at], *extra, *parameters[at:]])  # type: ignore[attr-defined]
    return subclass(base, MemoryModel, forward=forward)


@contextmanager
def generating(model: Any, reading: Reading) -> Iterator[None]:
    """Let forwards of ``model`` in this thread read ``reading``."""
    token = _GENERATING.set((model, reading))
    try:
        yield
    finally:
        _GENERATING.reset(token)


def _forward(
    model: Any, base: Any, memory: Memory | None, reuse: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    generation = _GENERATING.get()
    given = generation[1] if generation is not None and generation[0] is model else None
    if given is None and memory is None:
        if kwargs.get("past_key_values") is not None:
            check_cache(kwargs["past_key_values"], None, reuse)
        return base.forward(model, *args, **kwargs)
    inputs = _by_name(base, args, kwargs)
    cache = inputs.get("past_key_values")
    engine: DecoderEngine = model.mplus_engine
    engine.check_attention()
    reading = given or check_cache(cache, memory, reuse) or read(engine, memory)
    with running(_read_pass(engine, reading, base, inputs)):
        output = base.forward(model, **inputs)
    for holder in (cache, getattr(output, "past_key_values", None)):
        if holder is not None:
            holder._mplus_reading = reading
    return output


def _by_name(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one ``forward``, each under its name."""
    signature = inspect.signature(base.forward)
    _, *inputs = signature.bind_partial(None, *args, **kwargs).arguments.items()  # without self
    named = dict(inputs)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def read(engine: DecoderEngine, memory: Any, **options: Any) -> Reading:
    """A reading of ``memory`` for this decoder. Raises MemoryMismatchError when it belongs to another one."""
    if not isinstance(memory, Memory):
        raise MemoryMismatchError(f"memory must be an mplus.Memory, got {type(memory).__name__}")
    if memory.engine is not engine:
        raise MemoryMismatchError(
            "this memory belongs to another model: make it with this model's new_memory, "
            "or save it and load it for this model"
        )
    if memory.dtype != engine.dtype:
        raise MemoryMismatchError(
            f"the memory holds {memory.dtype} and the model computes in {engine.dtype}: "
            f"use memory.to(dtype={engine.dtype})"
        )
    return Reading.of(memory, engine.mechanism, keep=not torch.is_grad_enabled(), **options)


def check_cache(cache: Any, memory: Memory | None, reuse: bool) -> Reading | None:
    """The reading a non-empty cache was made under, if ``memory`` is still in that state (or ``reuse``).

    Raises:
        MemoryMismatchError: the cache belongs to another state, or to none.
    """
    length = getattr(cache, "get_seq_length", None)
    if length is None or int(length()) == 0:
        return None
    made_under: Reading | None = getattr(cache, "_mplus_reading", None)
    if made_under is None and memory is None:
        return None
    if made_under is not None and (reuse or (memory is not None and made_under.is_of(memory))):
        return made_under
    was = "without a memory" if made_under is None else f"with version {made_under.version} of a memory"
    now = "no memory" if memory is None else f"version {memory.version} of this memory"
    raise MemoryMismatchError(
        f"past_key_values was made {was}, the call reads {now}: start a new cache, "
        "or pass reuse_memory_cache=True to go on reading what the cache was made with"
    )


def _read_pass(engine: DecoderEngine, reading: Reading, base: Any, inputs: dict[str, Any]) -> Pass:
    """The pass of one forward; completes ``position_ids`` in ``inputs`` where the decoder would count padding."""
    text: Tensor = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    rows, tokens = text.shape[:2]
    repeats = reading.repeats(rows)
    mask = inputs.get("attention_mask")
    text_mask = None
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters
    if isinstance(mask, Tensor) and mask.dim() == 2:
        padded = not bool(mask.all())
        text_mask = mask[:, -tokens:].bool() if padded else None
        if padded and takes_positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
    offset: int | Tensor = 0
    positions = engine.retrofit.positions
    if positions.offset:
        extents = [positions.extent(count) for count in reading.prefix_rows()]
        offset = torch.tensor(extents, device=text.device)[:, None]
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = torch.arange(past, past + tokens, device=text.device).expand(rows, -1)
        inputs["position_ids"] = inputs["position_ids"] + offset.repeat_interleave(repeats, 0)
    return Pass(reading.source(text_mask), engine.adapter("read"), text_offset=offset)
