"""Prompts that are read with their memories: by themselves as ``generate`` reads them, or several in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from attrs import define, evolve
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from mplus.errors import NotSupported
from mplus.hf.batch.requests import RowRequest
from mplus.hf.batch.row_buffer import KeysValues
from mplus.hf.batch.wrapped_row import WrappedText
from mplus.hf.model.installed import WrappedModel
from mplus.hf.model.static_reader import moved_by_memory
from mplus.hf.reading.arguments import ReadArguments
from mplus.hf.reading.forward import ask, check_memory, read
from mplus.hf.reading.generating import generate_in
from mplus.hf.reading.many.joint import read_many
from mplus.hf.reading.reading import Reading, RetrievedSource, retrieved_sources
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.reading import TextReading, recall, refuse_for_text
from mplus.hf.text.reading import read as read_text
from mplus.mechanisms.decoder import Attended
from mplus.memory.memory import Memory


@define(frozen=True, eq=False)
class ReadPrompt:
    """A prompt that has been read.

    Attributes:
        logits: ``[V]`` of what follows.
        position: of the next token.
        sources: what came back from memory, by layer.
        version: of the memory; None: none was read.
        adapted: whether the reading adapter acted.
        text: goes on with it in the wrapped decoder; None: it was read together with others.
        layers: the parts of ``[memory | prompt]`` of every layer; None: the decoder's cache holds something else.
    """

    logits: Tensor
    position: int
    sources: Sequence[Sequence[RetrievedSource]] = ()
    version: int | None = None
    adapted: bool = False
    text: WrappedText | None = None
    layers: Sequence[Sequence[KeysValues]] | None = None


def acts(reading: Reading) -> bool:
    """Return whether the reading adapter acts in a forward that reads this."""
    return not reading.mechanism.empty_is_base or any(map(reading.mechanism.has_prefix, reading.views))


def read_alone(model: WrappedModel, request: RowRequest) -> ReadPrompt:
    """Read one prompt with its memory.

    Raises:
        ConfigError, InputError, MemoryMismatchError, NotSupported: as ``generate`` does.
    """
    engine = model.mplus_engine
    ids = torch.tensor([request.ids], device=engine.device)
    if request.memory is not None and isinstance(engine, TextEngine):
        whole, recalled = recalled_prompt(engine, request, request.memory, ids)
        text = WrappedText(model, None)
        found = result_of(text, text.read(whole))
        return evolve(found, sources=recalled.sources()[0], version=recalled.version)
    reading = None
    if request.memory is not None:
        engine.check_attention()
        reading = asked(model, read(engine, request.memory, 1), [request], ids.shape[1])
    text = WrappedText(model, reading)
    return result_of(text, text.read(ids))


def result_of(text: WrappedText, logits: Tensor) -> ReadPrompt:
    """Return a prompt that ``text`` has read, with the logits ``[V]`` of what follows."""
    reading, tokens = text.reading, text.ids.shape[1]
    if reading is None:
        return ReadPrompt(logits, tokens, text=text, layers=_layers(text.cache, None, 0, tokens))
    moved = int(moved_by_memory(reading, torch.device("cpu")))
    sources, layers = retrieved_sources(reading)[0], _layers(text.cache, reading, 0, tokens)
    return ReadPrompt(logits, tokens + moved, sources, reading.version, acts(reading), text, layers)


@torch.no_grad()
def read_together(model: WrappedModel, requests: Sequence[RowRequest]) -> list[ReadPrompt]:
    """Read several prompts in one forward, padded on the left; what each reads is as alone.

    Args:
        model: a wrapped decoder, whose cache holds the keys and values of all of a text.
        requests: all with a memory of rows, which ``joint_groups`` has in one group, or all without; with one
            ``min_score``, and all or none with ``query_tokens``, and with a ``retrieval_query``.

    Raises:
        ReadTogetherError: memories cannot be read, of which its ``errors`` say why.
        ConfigError, InputError, NotSupported: as ``generate`` does.
    """
    engine, lengths = model.mplus_engine, [len(one.ids) for one in requests]
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(one.ids)) + list(one.ids) for one in requests], device=engine.device)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths], device=engine.device)
    memories = [one.memory for one in requests if one.memory is not None]
    reading = None
    if memories:
        engine.check_attention()
        reading = asked(model, read_many(engine, memories), requests, longest)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kept = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}  # type: ignore[misc]
    output = generate_in(
        model, reading, model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
        return_dict=True, **kept,
    )  # fmt: skip
    cache, logits = output.past_key_values, output.logits[:, -1]
    layers = [_layers(cache, reading, row, length) for row, length in enumerate(lengths)]
    if reading is None:
        return [ReadPrompt(logits[row], length, layers=layers[row]) for row, length in enumerate(lengths)]
    moved = torch.as_tensor(moved_by_memory(reading, torch.device("cpu"))).expand(len(lengths), 1)[:, 0].tolist()
    sources, adapted = retrieved_sources(reading), acts(reading)
    return [
        ReadPrompt(logits[row], length + moved[row], sources[row], reading.versions[row], adapted, layers=layers[row])
        for row, length in enumerate(lengths)
    ]


def _arguments(requests: Sequence[RowRequest]) -> ReadArguments:
    """Return the arguments of the forward that reads these requests, as ``generate`` takes them."""
    first, several = requests[0], len(requests) > 1
    # Requests of one kind, so that all of them say a number or a query, or none does.
    query_tokens = cast("list[int]", [one.query_tokens for one in requests])
    queries = cast("list[str | Sequence[int]]", [one.retrieval_query for one in requests])
    return ReadArguments(
        memory=first.memory,
        query_tokens=query_tokens if several and first.query_tokens is not None else first.query_tokens,
        retrieval_query=queries if several and first.retrieval_query is not None else first.retrieval_query,
        min_score=first.min_score,
        retrieve_every=first.retrieve_every,
    )


def asked(model: WrappedModel, reading: Reading, requests: Sequence[RowRequest], tokens: int) -> Reading:
    """Return a reading that retrieves as the requests say, with so many columns of prompt."""
    ask(reading, model, _arguments(requests), None)
    reading.retrieve_every, reading.prompt_tokens, reading.keep = requests[0].retrieve_every, tokens, True
    reading.further_tokens = max(one.max_new_tokens for one in requests) - 1
    return reading


def _layers(cache: Cache | None, reading: Reading | None, row: int, tokens: int) -> list[list[KeysValues]] | None:
    """Return the parts of ``[memory | text]`` of one batch row in every layer, without filler and padding.

    None where the cache holds something else than the keys and values of all ``tokens``.
    """
    found = []
    for index, layer in enumerate([] if cache is None else cache.layers):
        segments = () if reading is None else reading.segments.get(index, ())
        if isinstance(segments, Attended) or not isinstance(layer, DynamicLayer):
            return None
        own_keys, own_values = cast("Tensor", layer.keys), cast("Tensor", layer.values)
        parts = [(own_keys[row, :, -tokens:], own_values[row, :, -tokens:])]
        for segment in reversed(segments):
            stream = row if segment.keys.shape[0] > 1 else 0
            count = segment.keys.shape[2] if segment.lengths is None else int(segment.lengths[stream])
            parts.insert(0, (segment.keys[stream, :, :count], segment.values[stream, :, :count]))
        if len({keys.shape[::2] for keys, _ in parts}) > 1 or parts[-1][0].shape[1] != tokens:
            return None
        found.append(parts)
    return found or None


def recalled_prompt(engine: TextEngine, request: RowRequest, memory: Memory, ids: Tensor) -> tuple[Tensor, TextReading]:
    """Return the prompt ``[1, T]`` with what a memory of text puts into it, and what that is.

    Raises:
        NotSupported: the mechanism answers calls, or the request asks for what it does not have.
    """
    arguments = _arguments([request])
    check_memory(engine, memory)
    refuse_for_text(engine, arguments)
    reading = read_text(memory, 1)
    if engine.mechanism.opens is not None and any(map(len, reading.states)):
        raise NotSupported(
            f"the mechanism {engine.mechanism.name!r} answers calls in the middle of a text, some tokens of which are "
            "taken back then: use generate"
        )
    recall(engine, reading, ids, None, arguments, request.max_new_tokens, together=False)
    return ids if reading.spliced is None else reading.spliced.ids, reading
