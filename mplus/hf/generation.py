"""``generate`` with memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mplus.errors import ConfigError, NotSupported
from mplus.hf.forward import check_cache, generate_in, is_generating, read
from mplus.hf.reading_checks import check_weights
from mplus.hf.sources import retrieved_sources
from mplus.hf.virtual_tokens import embedded_in_front
from mplus.memory.memory import Memory


def generate(
    model: Any,
    base_generate: Callable[..., Any],
    own: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """See ``MemoryModel.generate``; ``own``: its arguments that transformers does not know."""
    settings = Settings(model, args, {**kwargs, **{name: value for name, value in own.items() if value is not None}})
    # A generation within one of this model (a draft of an assistant) reads what that one reads.
    memory: Memory | None = own["memory"] if is_generating(model) else settings["memory"]
    if memory is None:
        return base_generate(*args, **kwargs)
    retrieve_every, output_sources = settings["retrieve_every"], bool(settings["output_sources"])
    if retrieve_every is not None and (
        isinstance(retrieve_every, bool) or not isinstance(retrieve_every, int) or retrieve_every < 1
    ):
        raise ConfigError(f"retrieve_every must be a whole number of at least 1, or None, got {retrieve_every!r}")
    refuse(settings, retrieve_every)
    if output_sources and not settings["return_dict_in_generate"]:
        raise ConfigError(
            "output_sources needs return_dict_in_generate=True: a tensor of sequences has no place for them"
        )
    engine = model.mplus_engine
    engine.check_attention()
    reading = check_cache(kwargs.get("past_key_values"), memory, bool(settings["reuse_memory_cache"]))
    prompts, tokens = prompt_shape(args, kwargs)
    tokens += embedded_in_front(model)
    if reading is None:
        reading = read(engine, memory, prompts)
    else:
        check_weights(engine, reading)
    reading.retrieve_every, reading.prompt_tokens = retrieve_every, tokens
    reading.repeats(prompts)
    # From here on further rows are copies of a prompt (beams, several samples), and no gradient is wanted.
    reading.repeats_allowed, reading.keep = True, True
    output = generate_in(model, reading, base_generate, *args, **kwargs)
    if output_sources:
        output.memory_sources = retrieved_sources(reading)
    return output


def prompt_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Prompts and tokens per prompt; without a prompt, generation starts from one BOS token."""
    places = [args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    given = next((prompt for prompt in places if prompt is not None and prompt.shape[1]), None)
    return (1, 1) if given is None else (given.shape[0], given.shape[1])


class Settings:
    """How a call wants to generate: its keywords, else its generation config, else the model's."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs
        self.configs = [
            kwargs.get("generation_config") or (args[1] if len(args) > 1 else None),
            getattr(model, "generation_config", None),
        ]

    def __getitem__(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        found = (getattr(config, name, None) for config in self.configs)
        return next((value for value in found if value is not None), None)


def refuse(settings: Settings, retrieve_every: int | None) -> None:
    """Raises NotSupported for ways of generating that memory cannot follow."""
    reasons = []
    if settings["prefill_chunk_size"] is not None:
        reasons.append("prefill_chunk_size would retrieve with the first piece of the prompt only")
    if settings["cache_implementation"] == "paged":
        reasons.append("cache_implementation='paged' leaves no place for memory in front of the text")
    if retrieve_every is not None:
        if settings["use_cache"] is False:
            reasons.append("retrieve_every needs use_cache=True: new rows would change text already read without it")
        reasons += [
            f"retrieve_every needs {name}=1: what is retrieved is for one continuation of a prompt"
            for name in ("num_beams", "num_return_sequences")
            if (settings[name] or 1) > 1
        ]
        reasons += [
            f"retrieve_every does not go with {name}: guessed tokens would retrieve as well"
            for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
            if settings[name]
        ]
    if reasons:
        raise NotSupported("generate with memory does not support this call: " + "; ".join(reasons))
