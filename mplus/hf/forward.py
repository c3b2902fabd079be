"""One forward of a wrapped decoder: which memory it reads, and whether its cache belongs to that memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError
from mplus.hf.engine import DecoderEngine
from mplus.hf.passes import Pass, run_in
from mplus.hf.reading import Reading, one_per_row
from mplus.hf.reading_checks import check_rows, check_weights, is_as_kept
from mplus.hf.virtual_tokens import only_learned
from mplus.memory.memory import Memory

T = TypeVar("T")
_GENERATING: ContextVar[tuple[Any, Reading] | None] = ContextVar("mplus_generating", default=None)
"""The model and reading of the generation this thread is in: inner forwards use it, other models do not see it."""


@contextmanager
def generating(model: Any, reading: Reading) -> Iterator[None]:
    """Let forwards of ``model`` in this thread read ``reading``; where nobody interrupts, see ``generate_in``."""
    token = _GENERATING.set((model, reading))
    try:
        yield
    finally:
        _GENERATING.reset(token)


def generate_in(model: Any, reading: Reading, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``function(*args, **kwargs)``, in which forwards of ``model`` read ``reading``; see ``run_in``."""
    context = copy_context()
    context.run(_GENERATING.set, (model, reading))
    return context.run(function, *args, **kwargs)


def is_generating(model: Any) -> bool:
    """Whether this thread is in a generation of ``model`` with a memory."""
    generation = _GENERATING.get()
    return generation is not None and generation[0] is model


def forward_with_memory(
    model: Any, base: Any, memory: Memory | None, reuse: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``base.forward`` reading ``memory``, or what the generation around it reads; without either, unchanged.

    Args:
        model: the wrapped decoder.
        base: its class before it was wrapped.
        memory: one stream per batch row, or one for all of them; or None.
        reuse: accept a cache made under another state of the memory, and read that state.
        args, kwargs: of ``forward``.

    Raises:
        MemoryMismatchError: batch, model or cache do not fit the memory.
    """
    generation = _GENERATING.get()
    given = generation[1] if generation is not None and generation[0] is model else None
    if given is None and memory is None:
        if kwargs.get("past_key_values") is not None:
            check_cache(kwargs["past_key_values"], None, reuse)
        return base.forward(model, *args, **kwargs)
    return _read(model, base, memory, given, reuse, _by_name(base, args, kwargs))


@torch.compiler.disable  # a compiled model reads uncompiled: what it reads differs from call to call
def _read(
    model: Any, base: Any, memory: Memory | None, given: Reading | None, reuse: bool, inputs: dict[str, Any]
) -> Any:
    cache = inputs.get("past_key_values")
    engine: DecoderEngine = model.mplus_engine
    engine.check_attention()
    reading, text = given or check_cache(cache, memory, reuse), _text(inputs)
    if reading is None:
        reading = read(engine, memory, text.shape[0])
    elif given is None:
        check_weights(engine, reading, whole=text.shape[1] > 1)
    output = run_in(_read_pass(engine, reading, base, inputs), base.forward, model, **inputs)
    for holder in (cache, getattr(output, "past_key_values", None)):
        if holder is not None:
            holder._mplus_reading = reading
    return output


@lru_cache(maxsize=64)  # looked up for every token
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _by_name(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one ``forward``, each under its name."""
    signature = _signature(base.forward)
    _, *inputs = signature.bind_partial(None, *args, **kwargs).arguments.items()  # without self
    named = dict(inputs)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def read(engine: DecoderEngine, memory: Any, rows: int, **options: Any) -> Reading:
    """A reading of ``memory`` for a batch of ``rows`` texts; a memory of one stream is read by all of them.

    Raises:
        MemoryMismatchError: it belongs to another decoder or has another dtype, or its streams are not as many as rows.
    """
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
    look = engine.watch.look()
    if look.names is None:
        memory.keep_up(look.weights)
    version, streams = memory.versioned_snapshot()
    views = one_per_row(streams, rows)
    prepared = engine.prepared(memory, version, look)
    if look.names is not None:
        check_rows(engine, views, look)
    elif prepared is not None and not all(is_as_kept(view, look) for view in streams):
        prepared = None
    keep = not torch.is_grad_enabled()
    return Reading(engine.mechanism, views, memory, version, prepared, look, keep=keep, **options)


def check_cache(cache: Any, memory: Memory | None, reuse: bool) -> Reading | None:
    """The reading a non-empty cache was made under, if ``memory`` is still in that state (or ``reuse``).

    Raises:
        MemoryMismatchError: the cache belongs to another state, or to none.
    """
    length = getattr(cache, "get_seq_length", None)
    if length is None or int(length()) == 0:
        return None
    made_under: Reading | None = getattr(cache, "_mplus_reading", None)
    if made_under is None and (memory is None or only_learned(cache)):
        return None
    if made_under is not None and (reuse or (memory is not None and made_under.is_of(memory))):
        return made_under
    was = "without a memory" if made_under is None else f"with version {made_under.version} of a memory"
    now = "no memory" if memory is None else f"version {memory.version} of this memory"
    raise MemoryMismatchError(
        f"past_key_values was made {was}, the call reads {now}: start a new cache, "
        "or pass reuse_memory_cache=True to go on reading what the cache was made with"
        + ("" if made_under is not None else " (for prefix tuning of PEFT, pass the PeftModel to mplus.wrap)")
    )


def _text(inputs: dict[str, Any]) -> Tensor:
    """Ids ``[B, T]`` or embeddings ``[B, T, d]`` of the text. Raises InputError where there are none."""
    text = inputs.get("input_ids")
    text = inputs.get("inputs_embeds") if text is None else text
    if not isinstance(text, Tensor) or text.dim() < 2:
        raise InputError(
            "forward with a memory needs input_ids [B, T] or inputs_embeds [B, T, d], "
            f"got {list(text.shape) if isinstance(text, Tensor) else text!r}"
        )
    return text


def _read_pass(engine: DecoderEngine, reading: Reading, base: Any, inputs: dict[str, Any]) -> Pass:
    """The pass of one forward; completes ``position_ids`` in ``inputs`` where the decoder would count padding."""
    text = _text(inputs)
    rows, tokens = text.shape[:2]
    repeats = reading.repeats(rows)
    mask = inputs.get("attention_mask")
    text_mask = None
    takes_positions = "position_ids" in _signature(base.forward).parameters
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
