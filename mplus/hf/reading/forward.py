"""One forward of a wrapped decoder: which memory it reads, and whether its cache belongs to that memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from attrs import evolve
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from mplus.errors import ConfigError, MechanismError, MemoryMismatchError, NotSupported
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.reading.arguments import DEFAULTS, GivenArguments, ReadArguments, check_spelling
from mplus.hf.reading.caches import TextSoFar, check_cache, follow, keep_reading, text_in
from mplus.hf.reading.checks import check_rows, check_weights, is_as_kept
from mplus.hf.reading.generating import generation_of
from mplus.hf.reading.inputs import ForwardInputs
from mplus.hf.reading.override import mechanism_for_reads
from mplus.hf.reading.pieces import read_in_pieces
from mplus.hf.reading.placing import place_text
from mplus.hf.reading.reading import Reading, one_per_row, report_sources, retrieved_sources
from mplus.hf.reading.retrieval import ReadSource, reopen_where_due, resume, without_padding
from mplus.hf.retrofit.context import Collection, Pass, current_pass, merged_for, run_in
from mplus.hf.types import Argument, DecoderOutput, Output
from mplus.mechanisms.decoder import PassResult, Text
from mplus.memory.engine import Engine
from mplus.memory.memory import Memory
from mplus.memory.recompute import refresh_if_stale

if TYPE_CHECKING:
    from mplus.hf.model.installed import WrappedModel


def forward_with_memory(
    model: WrappedModel,
    base: type[PreTrainedModel],
    asked: GivenArguments,
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument],
) -> Output:
    """Run ``base.forward`` with a memory: that of the generation around it, of the call, or of ``model.reading``.

    Args:
        model: the wrapped decoder.
        base: its class before it was wrapped.
        asked: the arguments of the call that mplus added; see ``ReadArguments``.
        args, kwargs: the others.

    Raises:
        ArgumentError: a keyword is one of ours, misspelt.
        ConfigError, InputError: an argument breaks its rule.
        MemoryMismatchError: batch, model or cache do not fit the memory.
        NotSupported: another thread is in ``model.reading``, or a way of calling that memory cannot follow.
    """
    generation = generation_of(model)
    # A pass that a mechanism runs while it gets ready for this generation reads nothing of it.
    if generation is not None and (generation.reading is None or current_pass() is not None):
        return base.forward(model, *args, **kwargs)
    if generation is not None:
        return _read(model, base, ReadArguments(), generation.reading, ForwardInputs.of(base, args, kwargs))
    if not torch.compiler.is_compiling():
        check_spelling(kwargs, base)
    plain = all(value is DEFAULTS[name] for name, value in asked.items())
    # A pass of mplus itself, such as a write, knows what it reads, whatever block it runs in.
    arguments = None if plain and current_pass() is not None else arguments_of(model, asked)
    if arguments is None or arguments.memory is None:
        cache = cast("Cache | None", kwargs.get("past_key_values"))
        if cache is not None:
            check_cache(cache, None, arguments is not None and arguments.reuse_memory_cache)
        return base.forward(model, *args, **kwargs)
    return _read(model, base, arguments, None, ForwardInputs.of(base, args, kwargs))


def arguments_of(model: WrappedModel, asked: GivenArguments) -> ReadArguments | None:
    """Return the memory that a call reads, and how: as it asks, else as the ``model.reading`` around it says.

    The block counts where the call names no memory. None where nothing is asked and there is no block.
    """
    changed = cast("GivenArguments", {name: one for name, one in asked.items() if one is not DEFAULTS[name]})
    around = None if "memory" in changed else model.mplus_engine.readings.current()
    if around is not None:
        return evolve(around, **changed) if changed else around
    return ReadArguments(**changed) if changed else None


@torch.compiler.disable  # a compiled model reads uncompiled: what it reads differs from call to call
def _read(
    model: WrappedModel,
    base: type[PreTrainedModel],
    arguments: ReadArguments,
    given: Reading | None,
    inputs: ForwardInputs,
) -> Output:
    engine = model.mplus_engine
    engine.check_attention()
    if given is not None:
        return _run(engine, given, base, inputs)
    as_dict = inputs.named.get("return_dict") is not False and getattr(model.config, "return_dict", True)
    if arguments.output_sources and not as_dict:
        raise ConfigError("output_sources needs return_dict=True: a tuple has no place for them")
    reading = _reading_of(model, arguments, inputs)
    if reading.retrieve_every is None:
        output = _run(engine, reading, base, inputs)
    else:
        read_piece = cast("Callable[[ForwardInputs], DecoderOutput]", partial(_run, engine, reading, base, piece=True))
        pieces = read_in_pieces(model, reading, inputs, read_piece)  # which asks for outputs, not tuples
        output = pieces if as_dict else pieces.to_tuple()
    if arguments.output_sources:
        report_sources(output, retrieved_sources(reading))
    return output


def _reading_of(model: WrappedModel, arguments: ReadArguments, inputs: ForwardInputs) -> Reading:
    """Return the reading of a call: a new one, or that of the cache it goes on with."""
    engine, text = model.mplus_engine, inputs.text
    reading = check_cache(inputs.cache, arguments.memory, arguments.reuse_memory_cache)
    if reading is None:
        reading = read(engine, cast("Memory", arguments.memory), text.shape[0])
        ask(reading, model, arguments, None if inputs.is_masked else inputs.ids)
    else:
        check_weights(engine, reading, whole=text.shape[1] > 1)
        go_on(reading, arguments)
    reading.retrieve_every = arguments.retrieve_every
    one_by_one = reading.retrieve_every is not None and len(reading.views) > 1
    if one_by_one and reading.look is not None and reading.look.names is not None and engine.own_attention.used:
        raise NotSupported(
            "forward with retrieve_every and adapter_names does not go with a retriever that ranks rows by the "
            "decoder's attention: read one row at a time, or use the retriever 'linear'"
        )
    return reading


def ask(
    reading: Reading, model: PreTrainedModel, arguments: ReadArguments, unmasked: Tensor | None, virtual_tokens: int = 0
) -> None:
    """Say with which tokens a new reading retrieves.

    Args:
        reading: for one forward or generation.
        model: the wrapped decoder.
        arguments: of the call.
        unmasked: ids ``[B, T]`` that came without a mask; None: there is a mask, or there are no ids.
        virtual_tokens: learned embeddings in front of the text, which retrieve with it and are not counted.

    Raises:
        InputError: ``query_tokens`` or ``retrieval_query`` are not one per row.
        NotSupported: it should retrieve anew, or with other tokens than the text's, and the mechanism does not.
    """
    if arguments.retrieve_every is not None and not (reading.mechanism.retrieves or reading.mechanism.reopens):
        raise NotSupported(
            f"retrieve_every does not go with the mechanism {reading.mechanism.name!r}, which chooses once what a text "
            "reads: leave it out"
        )
    _ask_for(reading, arguments)
    counts = arguments.query_tokens_of(len(reading.views))
    if unmasked is not None and not isinstance(counts, tuple):
        padding_id = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
        reading.query_mask = pad(without_padding(unmasked, padding_id), (virtual_tokens, 0), value=True)
    if counts is not None and virtual_tokens:
        counts = tuple(one + virtual_tokens for one in counts) if isinstance(counts, tuple) else counts + virtual_tokens
    reading.query_tokens = counts


def go_on(reading: Reading, arguments: ReadArguments) -> None:
    """Say that another call goes on with the text of ``reading``, whose new tokens may ask for something else."""
    reading.goes_on, reading.prompt_tokens = True, None
    _ask_for(reading, arguments)


def _ask_for(reading: Reading, arguments: ReadArguments) -> None:
    if arguments.min_score is not None and not reading.mechanism.takes_min_score:
        raise NotSupported(
            f"min_score does not go with the mechanism {reading.mechanism.name!r}, which has no threshold: leave it out"
        )
    if arguments.retrieval_query is not None and not reading.mechanism.retrieves_in_open:
        raise NotSupported(
            f"retrieval_query does not go with the mechanism {reading.mechanism.name!r}, whose layers retrieve with "
            "what they make of the text: leave it out"
        )
    queries = arguments.queries_of(reading.tokenizer, len(reading.views))
    reading.queries, reading.min_score = queries, arguments.min_score


def _run(
    engine: DecoderEngine, reading: Reading, base: type[PreTrainedModel], inputs: ForwardInputs, piece: bool = False
) -> Output:
    """Run one forward of the decoder."""
    active, so_far = _read_pass(engine, reading, inputs, piece)
    output: Output = run_in(active, base.forward, engine.model, **inputs.named)
    # The cache that came and the one that is returned: a decoder may return another one.
    for cache in (inputs.cache, getattr(output, "past_key_values", None)):
        if cache is not None:
            keep_reading(cache, reading)
            if so_far is not None:
                follow(cache, so_far)
    return output


def check_memory(engine: Engine, memory: Memory) -> None:
    """Raise MemoryMismatchError when ``memory`` is none of this decoder, or has another dtype."""
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


def read(engine: DecoderEngine, memory: Memory, rows: int) -> Reading:
    """Return a reading of ``memory`` for a batch of ``rows`` texts; a memory of one stream is read by all of them.

    Raises:
        MemoryMismatchError: it belongs to another decoder or has another dtype, or its streams are not as many as rows.
    """
    check_memory(engine, memory)
    look = engine.watch.look()
    if look.names is None:
        refresh_if_stale(memory.streams, look.weights)
    version, streams = memory.streams.versioned_snapshot()
    views = one_per_row(streams, rows)
    prepared = engine.prepared(memory, version, look)
    if look.names is not None:
        check_rows(engine, views, look)
    elif prepared is not None and not all(is_as_kept(view, look) for view in streams):
        prepared = None
    keep = not torch.is_grad_enabled()
    return Reading(mechanism_for_reads(engine), views, memory, version, prepared, look, keep=keep)


def _read_pass(
    engine: DecoderEngine, reading: Reading, inputs: ForwardInputs, piece: bool
) -> tuple[Pass, TextSoFar | None]:
    """Return the pass of one forward, and the text with it, where the mechanism wants to know.

    Completes ``position_ids`` in ``inputs`` where memory moves the text.
    """
    text = inputs.text
    rows, tokens = text.shape[:2]
    reading.repeats(rows)
    text_mask = inputs.skip_padding()
    if inputs.mask is None and inputs.is_masked and reading.prompt_mask is not None and reading.opened is None:
        # With a static cache generation passes masks as attention takes them, which do not say what is padding.
        text_mask = reading.prompt_mask.repeat_interleave(rows // len(reading.prompt_mask), 0).to(text.device)
    source, mechanism = ReadSource(reading, text_mask, piece), reading.mechanism
    so_far = None
    if mechanism.reopens or mechanism.finishes:
        so_far = text_in(inputs.cache) or TextSoFar.empty(rows, text.device, mechanism.new_cache())
        so_far = so_far.with_tokens(text, text_mask)
    if reading.opened is None:
        open_reading(engine, reading, source, text, so_far)
    elif so_far is not None and reading.reopens:
        reopen_where_due(reading, engine.decoder, so_far, tokens, piece)
    elif so_far is not None and inputs.cache is not None and reading.goes_on and mechanism.reopens and tokens > 1:
        resume(reading, engine.decoder, so_far, tokens, inputs.cache)
    reading.goes_on = False
    opened = reading.need_opened()
    if opened.settled is not None and reading.reopens:
        raise NotSupported(f"retrieve_every does not go with the mechanism {mechanism.name!r} here: {opened.settled}")
    offset, placement = place_text(engine, reading, inputs, text_mask)
    # With nothing to read the pass is the decoder's own, without an adapter, bit for bit.
    if mechanism.empty_is_base and not any(map(mechanism.has_prefix, reading.views)):
        return Pass(source, None, text_offset=offset), so_far
    collection, finish = None, None
    if so_far is not None and mechanism.finishes:
        collection, finish = Collection(mechanism.collect), partial(_finish, reading, so_far)
    adapter = engine.adapter("read")
    active = Pass(
        source,
        adapter,
        collection=collection,
        finish=finish,
        text_offset=offset,
        placement=placement,
        merged=merged_for(engine.model) if reading.keep and not engine.model.training else {},
    )
    return active, so_far


def open_reading(
    engine: DecoderEngine, reading: Reading, source: ReadSource, text: Tensor, so_far: TextSoFar | None
) -> None:
    """Let the mechanism get ready for a text before its first forward; guessed tokens are not shown to it.

    Args:
        engine: of the decoder.
        reading: of the memory; what the mechanism makes is kept there.
        source: of the first forward, which says what of the text is padding and which tokens retrieve.
        text: ids ``[B, T]`` int64 or embeddings ``[B, T, w]``, with the tokens that an assistant guesses.
        so_far: the text in the cache, for mechanisms that want to know it; None: for others.
    """
    repeats, prompt = reading.repeats(text.shape[0]), slice(None, reading.prompt_tokens)
    asked = any(map(reading.mechanism.has_prefix, reading.views))
    query = source.asked(text[::repeats]) if asked else None
    copies = repeats if reading.reopens else 1
    if copies > 1:
        query, repeats = None if query is None else query.repeat_interleave(copies, 0), 1
    # One of each set of copies, as beams are: they ask the same.
    own = text[::repeats, prompt]
    front = Text(
        ids=own if text.dim() == 2 else None,
        mask=None if source.text_mask is None else source.text_mask[::repeats, prompt],
        tokenizer=reading.tokenizer,
        embedded=None if text.dim() == 2 else own,
        query=None if query is None else query[:, prompt],
    )
    if reading.memory is not None and reading.look is not None:
        front = evolve(front, shared=partial(engine.shared, reading.memory, reading.version, reading.look))
    if reading.look is not None:
        several = zip(reading.memories, reading.versions, strict=True)
        tables = [partial(engine.shared, memory, version, reading.look) for memory, version in several]
        front = evolve(front, shared_by_row=tables)
    reading.open(engine.decoder, reading.asking(front, copies), copies)
    if so_far is not None and query is not None:
        so_far.begin(query.repeat_interleave(repeats, 0), own.shape[1], reading.context_tokens)


def _finish(reading: Reading, so_far: TextSoFar, result: PassResult) -> Tensor:
    """Let the mechanism give the final hidden state ``[B, T, d]``."""
    before, mechanism = result.need_hidden(), reading.mechanism
    hidden = mechanism.finish(reading.need_opened(), evolve(result, text=so_far.whole(reading.tokenizer)), so_far.own)
    if hidden.shape != before.shape or hidden.dtype != before.dtype:
        raise MechanismError(
            f"the mechanism {mechanism.name!r} must return the final hidden state as {before.dtype} "
            f"{list(before.shape)} from finish, got {hidden.dtype} {list(hidden.shape)}"
        )
    return hidden
