"""``generate`` with memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Self, cast

from attrs import evolve
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from mplus.errors import ConfigError, NotSupported
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.reading.arguments import DEFAULTS, Given, GivenArguments, ReadArguments, check_spelling
from mplus.hf.reading.caches import check_cache, embedded_by
from mplus.hf.reading.checks import check_weights
from mplus.hf.reading.forward import ask, go_on, read
from mplus.hf.reading.generating import generate_in, is_generating
from mplus.hf.reading.open_readings import OpenReadings
from mplus.hf.reading.override import mechanism_for_reads
from mplus.hf.reading.reading import report_sources, retrieved_sources
from mplus.hf.types import Argument, Generated


class GenerateCall:
    """The arguments of one ``generate``, and the settings it runs with.

    A setting is what a keyword says, else the generation config of the call, else that of the model.

    Args:
        model: the wrapped decoder.
        own: the arguments of the call that mplus added; None says nothing.
        args, kwargs: the others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        own: Mapping[str, Given],
        args: tuple[Argument, ...],
        kwargs: Mapping[str, Argument],
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.own = cast("GivenArguments", {name: value for name, value in own.items() if value is not None})
        named = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        self.configs = [cast("GenerationConfig | None", named), getattr(model, "generation_config", None)]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        base: type[PreTrainedModel],
        own: Mapping[str, Given],
        args: tuple[Argument, ...],
        kwargs: Mapping[str, Argument],
    ) -> Self:
        """Return the call of a method ``generate``.

        Args:
            model: the wrapped decoder.
            base: its class before it was wrapped.
            own: the arguments of the call that mplus added.
            args, kwargs: the others.

        Raises:
            ArgumentError: a keyword, or a setting of the call's config, is one that mplus adds, misspelt.
        """
        check_spelling(kwargs, base)
        call = cls(model, own, args, kwargs)
        check_spelling(getattr(call.configs[0], "__dict__", ()), base)
        return call

    def __getitem__(self, name: str) -> Argument:
        """Return the setting ``name``, or None."""
        if name in self.kwargs:
            return self.kwargs[name]
        values = (getattr(config, name, None) for config in self.configs)
        return next((value for value in values if value is not None), None)

    def number(self, name: str) -> int | None:
        """Return a setting that is a whole number, or None."""
        return cast("int | None", self[name])  # transformers checks it

    def read_arguments(self, readings: OpenReadings) -> ReadArguments:
        """Return the memory the call reads, and how: as it says, else a block of ``model.reading``, else the config.

        Where a call names a memory, a block does not count. A generation within one of this model (a draft of an
        assistant) goes by its keywords alone, since its forwards read what the one around it reads.

        Args:
            readings: the blocks of ``model.reading`` that are open.
        """
        if is_generating(self.model):
            return ReadArguments(**self.own)
        call, default = (
            cast("GivenArguments", {name: one for name in DEFAULTS if (one := getattr(config, name, None)) is not None})
            for config in self.configs
        )
        given = call | self.own
        around = readings.current() if given.get("memory") is None else None
        if around is not None:
            return evolve(around, **given)
        return ReadArguments(**(default | given))

    def check_reports(self, arguments: ReadArguments) -> None:
        """Raise ConfigError where sources are to be reported, and the call returns a tensor."""
        if arguments.output_sources and not self["return_dict_in_generate"]:
            raise ConfigError(
                "output_sources needs return_dict_in_generate=True: a tensor of sequences has no place for them"
            )

    def prompt_shape(self) -> tuple[int, int]:
        """Return the number of prompts and of tokens per prompt; without a prompt, generation starts from BOS alone."""
        prompt = self._prompt("inputs", "input_ids", "inputs_embeds")
        return (1, 1) if prompt is None else (prompt.shape[0], prompt.shape[1])

    def unmasked_prompt(self) -> Tensor | None:
        """Return ids ``[B, T]`` of prompts that came without a mask; None where there is a mask, or are no ids."""
        if self.kwargs.get("attention_mask") is not None or self.kwargs.get("inputs_embeds") is not None:
            return None
        prompt = self._prompt("inputs", "input_ids")
        return prompt if prompt is None or prompt.dim() == 2 else None

    def prompt_mask(self, prompt: int) -> Tensor | None:
        """Return ``[B, T]`` bool, False at padding of prompts of so many tokens; None where there is no such mask."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == prompt else None

    def further_tokens(self, prompt: int) -> int:
        """Return the number of tokens that may be read behind a prompt of so many: all new ones but the last."""
        new, longest = self.number("max_new_tokens"), self.number("max_length")
        most = new if new is not None else 0 if longest is None else longest - prompt
        return max(most - 1, 0)

    def _prompt(self, *names: str) -> Tensor | None:
        prompts = cast("list[Tensor | None]", [*self.args[:1], *(self.kwargs.get(name) for name in names)])
        return next((prompt for prompt in prompts if prompt is not None and prompt.shape[1]), None)


def generate(
    model: PreTrainedModel,
    engine: DecoderEngine,
    base: type[PreTrainedModel],
    own: Mapping[str, Given],
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument],
) -> Generated:
    """Generate as ``MemoryModel.generate`` describes.

    Args:
        model: the wrapped decoder.
        engine: its engine.
        base: its class before it was wrapped.
        own: the arguments of the call that mplus added.
        args, kwargs: the others.
    """
    call = GenerateCall.of(model, base, own, args, kwargs)
    arguments = call.read_arguments(engine.readings)
    base_generate: Callable[..., Generated] = partial(base.generate, model)  # type: ignore[attr-defined]
    if arguments.memory is None:
        return base_generate(*args, **kwargs)
    mechanism = mechanism_for_reads(engine)
    refuse(call, arguments.retrieve_every, follows_beams=mechanism.reopens and not mechanism.retrieves)
    call.check_reports(arguments)
    engine.check_attention()
    cache = cast("Cache | None", kwargs.get("past_key_values"))
    reading = check_cache(cache, arguments.memory, arguments.reuse_memory_cache)
    prompts, tokens = call.prompt_shape()
    # While a PeftModel generates, it prepares the inputs in the place of the decoder.
    virtual = embedded_by(getattr(model.prepare_inputs_for_generation, "__self__", None))
    if reading is None:
        reading = read(engine, arguments.memory, prompts)
        ask(reading, model, arguments, call.unmasked_prompt(), virtual)
    else:
        check_weights(engine, reading)
        go_on(reading, arguments)
    reading.retrieve_every, reading.prompt_tokens = arguments.retrieve_every, tokens + virtual
    reading.further_tokens, reading.prompt_mask = call.further_tokens(tokens), call.prompt_mask(tokens)
    reading.repeats(prompts)
    # From here on further rows are copies of a prompt (beams, several samples), and no gradient is wanted.
    reading.repeats_allowed, reading.keep = True, True
    output = generate_in(model, reading, base_generate, *args, **kwargs)
    if arguments.output_sources:
        report_sources(output, retrieved_sources(reading))
    return output


def refuse(call: GenerateCall, retrieve_every: int | None, *, follows_beams: bool = False) -> None:
    """Raise NotSupported for ways of generating that memory cannot follow.

    Args:
        call: the call.
        retrieve_every: as it asks.
        follows_beams: what is retrieved anew may differ between the beams or samples of one prompt.
    """
    reasons = []
    if call["prefill_chunk_size"] is not None:
        reasons.append("prefill_chunk_size would retrieve with the first piece of the prompt only")
    if call["cache_implementation"] == "paged":
        reasons.append("cache_implementation='paged' leaves no place for memory in front of the text")
    if retrieve_every is not None:
        if call["use_cache"] is False:
            reasons.append("retrieve_every needs use_cache=True: new rows would change text already read without it")
        reasons += [
            f"retrieve_every needs {name}=1: what is retrieved is for one continuation of a prompt"
            for name in ("num_beams", "num_return_sequences")
            if (call.number(name) or 1) > 1 and not follows_beams
        ]
        reasons += [
            f"retrieve_every does not go with {name}: guessed tokens would retrieve as well"
            for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
            if call[name]
        ]
    if reasons:
        raise NotSupported("generate with memory does not support this call: " + "; ".join(reasons))
