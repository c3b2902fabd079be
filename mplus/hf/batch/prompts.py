"""Prompts that are read with their memories, each as ``generate`` would read it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from attrs import define
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mplus.errors import NotSupported
from mplus.hf.batch.requests import RowRequest
from mplus.hf.batch.row_buffer import KeysValues
from mplus.hf.batch.wrapped_row import WrappedText
from mplus.hf.model.installed import WrappedModel
from mplus.hf.model.sizes import known_positions
from mplus.hf.model.static_reader import moved_by_memory
from mplus.hf.reading.arguments import ReadArguments
from mplus.hf.reading.forward import ask, check_memory, read
from mplus.hf.reading.reading import RetrievedSource, retrieved_sources
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.reading import read as read_text
from mplus.hf.text.reading import recall, refuse_for_text
from mplus.mechanisms.decoder import Attended
from mplus.memory.memory import Memory


@define(frozen=True, eq=False)
class ReadPrompt:
    """A prompt that has been read.

    Attributes:
        text: the wrapped decoder's cache of it.
        logits: ``[V]`` of what follows.
        sources: what came back from memory, by layer.
        version: of the memory; None: none was read.
        adapted: whether the reading adapter acted.
        position: of the next token.
    """

    text: WrappedText
    logits: Tensor
    sources: Sequence[Sequence[RetrievedSource]] = ()
    version: int | None = None
    adapted: bool = False
    position: int = 0

    def keys_values(self) -> list[KeysValues] | None:
        """Return ``[memory | prompt]`` of every layer; None where the decoder's cache holds something else."""
        reading, layers = self.text.reading, self.text.cache.layers if self.text.cache is not None else []
        found = []
        for index, layer in enumerate(layers):
            segments = () if reading is None else reading.segments.get(index, ())
            if isinstance(segments, Attended) or not isinstance(layer, DynamicLayer):
                return None
            parts = [(cast("Tensor", layer.keys)[0], cast("Tensor", layer.values)[0])]
            for segment in reversed(segments):
                count = segment.keys.shape[2] if segment.lengths is None else int(segment.lengths[0])
                parts.insert(0, (segment.keys[0, :, :count], segment.values[0, :, :count]))
            if len({keys.shape[::2] for keys, _ in parts}) > 1:
                return None
            keys, values = zip(*parts, strict=True)
            found.append((torch.cat(keys, 1), torch.cat(values, 1)))
        return found or None


def read_prompt(model: WrappedModel, request: RowRequest) -> ReadPrompt:
    """Read the prompt of one row with its memory.

    Raises:
        ConfigError, InputError, MemoryMismatchError, NotSupported: as ``generate`` does.
    """
    engine = model.mplus_engine
    ids = torch.tensor([request.ids], device=engine.device)
    arguments = ReadArguments(
        memory=request.memory,
        query_tokens=request.query_tokens,
        retrieval_query=request.retrieval_query,
        min_score=request.min_score,
        retrieve_every=request.retrieve_every,
    )
    if request.memory is None:
        text = WrappedText(model, None)
        return ReadPrompt(text, text.read(ids), position=ids.shape[1])
    if isinstance(engine, TextEngine):
        return _read_with_text(model, engine, request, request.memory, ids, arguments)
    engine.check_attention()
    reading = read(engine, request.memory, 1)
    ask(reading, model, arguments, None)
    reading.retrieve_every, reading.prompt_tokens = request.retrieve_every, ids.shape[1]
    reading.further_tokens, reading.keep = request.max_new_tokens - 1, True
    text = WrappedText(model, reading)
    logits = text.read(ids)
    moved = moved_by_memory(reading, torch.device("cpu"))
    return ReadPrompt(
        text,
        logits,
        retrieved_sources(reading)[0],
        reading.version,
        not reading.mechanism.empty_is_base or any(map(reading.mechanism.has_prefix, reading.views)),
        ids.shape[1] + int(moved),
    )


def room_of(model: WrappedModel, position: int) -> int | None:
    """Return how many tokens may come from ``position`` on; None: the decoder has not learned its positions."""
    engine = model.mplus_engine
    if isinstance(engine, TextEngine) or engine.shape.positions != "learned":
        return None
    most = known_positions(model.config.get_text_config(decoder=True))
    return None if most is None else most - position


def _read_with_text(
    model: WrappedModel,
    engine: TextEngine,
    request: RowRequest,
    memory: Memory,
    ids: Tensor,
    arguments: ReadArguments,
) -> ReadPrompt:
    check_memory(engine, memory)
    refuse_for_text(engine, arguments)
    reading = read_text(memory, 1)
    if engine.mechanism.opens is not None and any(map(len, reading.states)):
        raise NotSupported(
            f"the mechanism {engine.mechanism.name!r} answers calls in the middle of a text, some tokens of which are "
            "taken back then: use generate"
        )
    recall(engine, reading, ids, None, arguments, request.max_new_tokens, together=False)
    text = WrappedText(model, None)
    whole = ids if reading.spliced is None else reading.spliced.ids
    return ReadPrompt(text, text.read(whole), reading.sources()[0], reading.version, position=whole.shape[1])
