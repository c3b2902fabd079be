"""``generate`` with a memory of text: recalled text in front, calls answered; the result is prompt and visible text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from attrs import define, field
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mplus.errors import InputError, NotSupported
from mplus.hf.reading.arguments import Given
from mplus.hf.reading.caches import keep_reading
from mplus.hf.reading.forward import check_memory
from mplus.hf.reading.generating import generate_in, is_generating
from mplus.hf.reading.generation import GenerateCall, refuse
from mplus.hf.reading.inputs import signature_of
from mplus.hf.reading.reading import report_sources
from mplus.hf.text.calls import Continuation, Pieces, refuse_for_calls
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.places import Spliced
from mplus.hf.text.reading import TextReading, read, recall, refuse_for_text
from mplus.hf.types import Argument, Generated

USUAL = 20
"""Tokens that transformers generates where no number is given."""
PROMPT = ("inputs", "input_ids", "attention_mask")
"""Arguments of ``generate`` that are the prompt."""
PIECES = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "return_dict_in_generate")
"""Settings that are of a whole text, and not of a piece of it."""


def generate_with_text(
    model: PreTrainedModel,
    engine: TextEngine,
    base: type,
    own: Mapping[str, Given],
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument],
) -> Generated:
    """Generate as ``TextMemoryModel.generate`` describes; arguments as of ``mplus.hf.reading.generation.generate``."""
    call = GenerateCall.of(model, base, own, args, kwargs)
    arguments = call.read_arguments(engine.readings)
    base_generate: Callable[..., Generated] = partial(base.generate, model)  # type: ignore[attr-defined]
    if arguments.memory is None or is_generating(model):
        return base_generate(*args, **kwargs)
    check_memory(engine, arguments.memory)
    refuse(call, None)
    refuse_for_text(engine, arguments)
    call.check_reports(arguments)
    names = list(signature_of(base.generate).parameters)[1:]  # type: ignore[attr-defined]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    ids, mask = _prompts(call, named)
    reading = read(arguments.memory, len(ids))
    calls = engine.mechanism.opens is not None and any(map(len, reading.states))
    if calls:
        refuse_for_calls(call)
    new, longest = call.number("max_new_tokens"), call.number("max_length")
    if new is None:
        new = USUAL if longest is None else max(int(longest) - ids.shape[1], 1)
    recall(engine, reading, ids, mask, arguments, int(new), together=not calls)
    settings = {name: value for name, value in named.items() if name not in PROMPT}
    generation = _Generation(call, reading, partial(generate_in, model, None, base_generate), ids, settings)
    if calls:
        output: Generated = generation.with_calls(engine, mask, int(new))
    elif reading.spliced is not None:
        output = generation.with_recalled(reading.spliced)
    else:
        output = generation.generate(*args, **kwargs)
    if arguments.output_sources:
        report_sources(output, reading.sources())
    return output


def _prompts(call: GenerateCall, named: Mapping[str, Argument]) -> tuple[Tensor, Tensor | None]:
    """Return ids ``[B, T]`` of the prompts, and their mask as transformers would make it.

    Raises:
        InputError: there are no ids, or a mask of another shape.
        NotSupported: there is a cache.
    """
    ids = named.get("input_ids") if named.get("inputs") is None else named["inputs"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or named.get("inputs_embeds") is not None or not ids.shape[1]:
        raise InputError(
            "a memory of text is read by ids [B, T], and what is recalled goes between them: pass input_ids, got "
            f"{list(ids.shape) if isinstance(ids, Tensor) else ids!r}"
        )
    if named.get("past_key_values") is not None or named.get("cache_params") is not None:
        raise NotSupported(
            "generate with a memory of text begins with the whole prompt, into which recalled text goes: leave out the "
            "cache, and pass the text so far as the prompt"
        )
    mask = cast("Tensor | None", named.get("attention_mask"))
    padding, ends = call.number("pad_token_id"), call["eos_token_id"]
    if mask is None and padding is not None and padding not in (ends if isinstance(ends, list) else [ends]):
        mask = None if bool((ids != padding).all()) else (ids != padding).long()
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"attention_mask must be {list(ids.shape)} as the prompts, got {list(mask.shape)}")
    return ids, mask


@define(eq=False)
class _Generation:
    """One ``generate`` that reads a memory of text.

    Attributes:
        call: its arguments.
        reading: of the memory.
        generate: of the decoder alone.
        ids: ``[B, T]``, the prompts.
        settings: all arguments but the prompt.
    """

    call: GenerateCall
    reading: TextReading
    generate: Callable[..., Generated]
    ids: Tensor
    settings: dict[str, Argument]

    def with_recalled(self, spliced: Spliced) -> Generated:
        """Generate behind prompts with recalled text in them, and put the prompts alone in front of the result."""
        settings, ids = self.settings, self.ids
        for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            limit = self.call.number(name)  # of a whole sequence, which recalled text is a part of
            if limit and self.call[instead] is None:
                settings[name] = int(limit) + spliced.width
        if settings.get("streamer") is not None:
            settings["streamer"] = _WithoutRecalled(cast("BaseStreamer", settings["streamer"]), ids)
        output = self.generate(spliced.ids, attention_mask=spliced.mask, **settings)
        sequences = output if isinstance(output, Tensor) else output.sequences
        prompts = ids.repeat_interleave(len(sequences) // len(ids), 0)
        whole = torch.cat([prompts, sequences[:, spliced.ids.shape[1] :]], 1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = cast("torch.LongTensor", whole)
        if output.past_key_values is not None:
            keep_reading(output.past_key_values, self.reading)
        return output

    def with_calls(self, engine: TextEngine, mask: Tensor | None, new: int) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate ids ``[B, T + n]``, n up to ``new``, prompt by prompt, since calls come at different times."""
        ids, reading, settings = self.ids, self.reading, self.settings
        pieces = cast("Pieces", {name: settings.pop(name, None) for name in ("logits_processor", "stopping_criteria")})
        generate: Callable[..., Generated] = partial(
            self.generate, **{name: value for name, value in settings.items() if name not in PIECES}
        )
        whole, found = reading.spliced, []
        work, seen = (ids, mask) if whole is None else (whole.ids, whole.mask)
        for row, prompt in enumerate(work):
            context = (prompt if seen is None else prompt[seen[row].bool()]).tolist()
            found.append(Continuation(engine, reading, row, generate, context, new, pieces).run())
        longest, padding = max(map(len, found)), self.call.number("pad_token_id")
        filler = (reading.tokenizer.pad_token_id if padding is None else padding) or 0
        rows = ids.new_tensor([[*row, *[filler] * (longest - len(row))] for row in found])
        sequences = torch.cat([ids, rows.view(len(ids), longest)], 1)
        if not self.call["return_dict_in_generate"]:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=cast("torch.LongTensor", sequences))


@define(eq=False)
class _WithoutRecalled(BaseStreamer):
    """Shows a streamer the prompt as it was given, and what is generated.

    Attributes:
        streamer: of the call.
        prompt: ids ``[B, T]``.
    """

    streamer: BaseStreamer
    prompt: Tensor
    _begun: bool = field(default=False, init=False)

    def put(self, value: Tensor) -> None:
        """Hand tokens ``[B, n]`` or ``[B]`` on; in place of the first ones, the prompt."""
        self.streamer.put(value if self._begun else self.prompt.cpu())
        self._begun = True

    def end(self) -> None:
        """Hand on the end."""
        self.streamer.end()
