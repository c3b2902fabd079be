"""``generate`` with memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve
from torch import Tensor

from mplus.errors import ConfigError, NotSupported
from mplus.hf.reading.arguments import DEFAULTS, ReadArguments, check_spelling
from mplus.hf.reading.checks import check_weights
from mplus.hf.reading.forward import ask, check_cache, generate_in, is_generating, read
from mplus.hf.reading.retrieved_sources import retrieved_sources
from mplus.hf.reading.virtual_tokens import embedded_in_front


def generate(
    model: Any,
    base_generate: Callable[..., Any],
    own: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """See ``MemoryModel.generate``; ``own``: its arguments that transformers does not know."""
    check_spelling(kwargs, type(model).__mplus_base__)
    settings = Settings(model, args, {**kwargs, **{name: value for name, value in own.items() if value is not None}})
    check_spelling(getattr(settings.configs[0], "__dict__", ()), type(model).__mplus_base__)
    arguments = settings.read_arguments(model)
    if arguments.memory is None:
        return base_generate(*args, **kwargs)
    refuse(settings, arguments.retrieve_every)
    if arguments.output_sources and not settings["return_dict_in_generate"]:
        raise ConfigError(
            "output_sources needs return_dict_in_generate=True: a tensor of sequences has no place for them"
        )
    engine = model.mplus_engine
    engine.check_attention()
    reading = check_cache(kwargs.get("past_key_values"), arguments.memory, arguments.reuse_memory_cache)
    prompts, tokens = prompt_shape(args, kwargs)
    tokens += embedded_in_front(model)
    if reading is None:
        reading = read(engine, arguments.memory, prompts)
        ask(reading, model, arguments, unmasked_prompt(args, kwargs), embedded_in_front(model))
    else:
        check_weights(engine, reading)
    reading.retrieve_every, reading.prompt_tokens = arguments.retrieve_every, tokens
    reading.repeats(prompts)
    # From here on further rows are copies of a prompt (beams, several samples), and no gradient is wanted.
    reading.repeats_allowed, reading.keep = True, True
    output = generate_in(model, reading, base_generate, *args, **kwargs)
    if arguments.output_sources:
        output.memory_sources = retrieved_sources(reading)
    return output


def unmasked_prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Ids ``[B, T]`` of prompts that came without a mask; None where there is a mask, or are no ids."""
    if kwargs.get("attention_mask") is not None or kwargs.get("inputs_embeds") is not None:
        return None
    places = [args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids")]
    given = next((prompt for prompt in places if prompt is not None and prompt.shape[1]), None)
    return given if given is None or given.dim() == 2 else None


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

    def read_arguments(self, model: Any) -> ReadArguments:
        """What the call reads: as it says, else as the block of ``model.reading`` around it or the model's config says.

        Where a call names a memory, a block does not count. A generation within one of this model (a draft of an
        assistant) goes by its keywords alone, since its forwards read what the one around it reads.
        """
        said = {name: self.kwargs[name] for name in DEFAULTS if name in self.kwargs}
        if is_generating(model):
            return ReadArguments(**said)
        call, default = ({name: getattr(config, name, None) for name in DEFAULTS} for config in self.configs)
        said = {**{name: value for name, value in call.items() if value is not None}, **said}
        around = model.mplus_engine.readings.current() if said.get("memory") is None else None
        if around is not None:
            return evolve(around, **said)
        return ReadArguments(**{**{name: value for name, value in default.items() if value is not None}, **said})


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
