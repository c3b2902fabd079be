"""One forward of a decoder with a memory of text: what is recalled is part of its input, and not of its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from attrs import define
from torch import Tensor
from transformers import Cache

from mplus.errors import ConfigError, InputError, NotSupported
from mplus.hf.model.installed import Decoder, WrappedModel
from mplus.hf.reading.arguments import GivenArguments, ReadArguments, check_spelling
from mplus.hf.reading.caches import check_cache, keep_reading
from mplus.hf.reading.forward import arguments_of, check_memory
from mplus.hf.reading.generating import is_generating
from mplus.hf.reading.inputs import by_name, signature_of
from mplus.hf.reading.reading import report_sources
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.reading import TextReading, read, recall, refuse_for_text
from mplus.hf.types import Argument, DecoderOutput, ForwardArguments, Output
from mplus.memory.memory import Memory

CACHES = ("past_key_values", "cache_params")
"""What decoders call the argument that holds what they keep of a text."""


def forward_with_text(
    model: WrappedModel,
    base: type[Decoder],
    asked: GivenArguments,
    args: tuple[Argument, ...],
    kwargs: dict[str, Argument],
) -> Output:
    """Run ``base.forward`` with what a memory recalls: that of the call, or of ``model.reading``.

    Logits and hidden states are those of the tokens that were given.

    Args:
        model: the wrapped decoder.
        base: its class before it was wrapped.
        asked: the arguments of the call that mplus added; see ``ReadArguments``.
        args, kwargs: the others.

    Raises:
        ArgumentError, ConfigError, InputError: an argument breaks its rule.
        MemoryMismatchError: batch, model or cache do not fit the memory.
        NotSupported: another thread is in ``model.reading``, or the call has what recalled text does not go with.
    """
    forward: Callable[..., Output] = base.forward
    if is_generating(model):  # the generation has put it into the prompt
        return forward(model, *args, **kwargs)
    if not torch.compiler.is_compiling():
        check_spelling(kwargs, base)
    arguments = arguments_of(model, asked)
    if arguments is None or arguments.memory is None:
        for cache in filter(None, map(kwargs.get, CACHES)):
            check_cache(cast("Cache", cache), None, arguments is not None and arguments.reuse_memory_cache)
        return forward(model, *args, **kwargs)
    return _Forward(model, base, by_name(base, args, kwargs)).read(arguments, arguments.memory)


@define(eq=False)
class _Forward:
    """One forward of a decoder that reads a memory of text.

    Attributes:
        model: the wrapped decoder.
        base: its class before it was wrapped.
        inputs: the arguments of the call by name; they are changed to those that the decoder itself gets.
    """

    model: WrappedModel
    base: type[Decoder]
    inputs: ForwardArguments

    @torch.compiler.disable  # what is recalled differs from call to call
    def read(self, arguments: ReadArguments, memory: Memory) -> Output:
        """Run the forward as ``arguments`` say; ``memory`` is theirs."""
        model, inputs, engine = self.model, self.inputs, cast("TextEngine", self.model.mplus_engine)
        check_memory(engine, memory)
        refuse_for_text(engine, arguments)
        as_dict = inputs.get("return_dict") is not False and getattr(model.config, "return_dict", True)
        if arguments.output_sources and not as_dict:
            raise ConfigError("output_sources needs return_dict=True: a tuple has no place for them")
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise InputError(
                "a memory of text is read by ids [B, T], and what is recalled goes between them: pass input_ids, got "
                f"{list(ids.shape) if isinstance(ids, Tensor) else ids!r}"
            )
        if inputs.get("state") is not None:
            raise NotSupported(
                "forward with a memory of text cannot go on from a state that is no cache of transformers, which does "
                "not say what was recalled: use generate"
            )
        inputs["return_dict"] = True
        kept: TextReading | None = None
        for cache in filter(None, (inputs.get("past_key_values"), inputs.get("cache_params"))):
            kept = cast("TextReading | None", check_cache(cache, memory, arguments.reuse_memory_cache))
        reading = kept or read(memory, len(ids))
        if kept is not None:
            output = self._go_on(reading, ids.shape[1])
        else:
            mask = self._mask
            if mask is not None and mask.shape != ids.shape:
                raise InputError(f"attention_mask must be {list(ids.shape)} as input_ids, got {list(mask.shape)}")
            recall(engine, reading, ids, mask, arguments)
            output = self._begin(reading)
        reading.columns += ids.shape[1] + (0 if kept or reading.spliced is None else reading.spliced.width)
        for holder in filter(None, (getattr(output, name, None) for name in CACHES)):
            keep_reading(holder, reading)
        if arguments.output_sources:
            report_sources(output, reading.sources())
        return output if as_dict else output.to_tuple()

    def _begin(self, reading: TextReading) -> DecoderOutput:
        """Run the forward that recalled text is put into."""
        inputs, spliced = self.inputs, reading.spliced
        if spliced is None:
            return self.base.forward(self.model, **inputs)
        rows, tokens = spliced.kept.shape
        given = self._per_token(rows, tokens)
        if given:
            raise NotSupported(f"a memory of text does not go with {', '.join(given)} of each token: leave it out")
        positions = inputs.pop("position_ids", None)
        if "position_ids" in signature_of(self.base.forward).parameters:
            if positions is None and spliced.mask is not None:
                mask = self._mask
                mask = torch.ones_like(spliced.kept) if mask is None else mask
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            if positions is not None:
                inputs["position_ids"] = spliced.positions(positions.expand(rows, -1))
        labels, last = inputs.pop("labels", None), inputs.pop("logits_to_keep", 0)
        if labels is not None:
            moved = labels.new_full(spliced.ids.shape, -100)  # recalled text counts for no loss
            inputs["labels"] = moved.scatter(1, spliced.kept, labels)
        inputs["input_ids"], inputs["attention_mask"] = spliced.ids, spliced.mask
        output = self.base.forward(self.model, **inputs)
        # ``logits_to_keep`` counts tokens of the call, so all logits were made, and those asked for are taken here.
        kept = spliced.kept if isinstance(last, Tensor) or not last else spliced.kept[:, -last:]
        output.logits = _columns(output.logits, kept if not isinstance(last, Tensor) else kept[:, last])
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(_columns(one, spliced.kept) for one in output.hidden_states)
        return output

    def _go_on(self, reading: TextReading, tokens: int) -> DecoderOutput:
        """Run a forward of so many tokens behind a cache, in which the recalled text is."""
        inputs, spliced = self.inputs, reading.spliced
        if spliced is not None:
            mask, positions = self._mask, inputs.get("position_ids")
            if mask is not None:
                past = spliced.kept.shape[1]  # the call's mask knows nothing of recalled text, which is in the cache
                first = torch.ones_like(spliced.ids) if spliced.mask is None else spliced.mask
                mask = torch.cat([first, mask[:, past:].to(torch.int64)], 1)
            elif spliced.mask is not None:
                behind = reading.columns + tokens - spliced.ids.shape[1]
                mask = torch.cat([spliced.mask, spliced.mask.new_ones(len(spliced.mask), behind)], 1)
            if mask is not None:
                inputs["attention_mask"] = mask
            if positions is not None:
                inputs["position_ids"] = positions + spliced.inserted[:, None]
            elif mask is not None and "position_ids" in signature_of(self.base.forward).parameters:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        return self.base.forward(self.model, **inputs)

    @property
    def _mask(self) -> Tensor | None:
        # Not one as attention takes it: those that generation makes for a static cache do not come here.
        return cast("Tensor | None", self.inputs.get("attention_mask"))

    def _per_token(self, rows: int, tokens: int) -> list[str]:
        """Return the names of further arguments that have a value for each token."""
        known = {"input_ids", "attention_mask", "position_ids", "labels"}
        return [
            name
            for name, value in self.inputs.items()
            if name not in known and isinstance(value, Tensor) and tuple(value.shape[:2]) == (rows, tokens)
        ]


def _columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return ``[B, t, ...]``: of every row of ``values`` ``[B, T, ...]``, the columns ``[B, t]``."""
    return values[torch.arange(len(columns), device=values.device)[:, None], columns.to(values.device)]
