"""Writing: texts to streams, of one memory or of many, a chunk of each at a time in shared passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError
from mplus.memory.checks import check_dtype, check_finite, check_vocabulary
from mplus.memory.chunking import split, to_names, to_rows
from mplus.memory.engine import Engine
from mplus.memory.progress import progress_bar
from mplus.memory.report import WriteReport
from mplus.memory.stream import alike
from mplus.memory.texts import next_turn

if TYPE_CHECKING:
    from mplus.memory.memory import Memory


@define(frozen=True, eq=False)
class Stream:
    """A stream of a memory, and what is to be written to it.

    Attributes:
        memory, row: the stream.
        chunks: ids of each chunk.
        name: the source.
        report: of the memory; counts on.
    """

    memory: Memory
    row: int
    chunks: Sequence[Tensor]
    name: str | None
    report: WriteReport


@define(frozen=True, eq=False)
class Made:
    """Per layer what one stream gets of a pass: rows ``[k, d]``, and ``[k, w]`` where its rows are kept projected."""

    hidden: tuple[Tensor, ...]
    projected: tuple[Tensor, ...]


def write_together(
    memories: Sequence[Memory],
    data: Sequence[Any],
    sources: Sequence[Any] | None = None,
    *,
    progress: bool | None = None,
) -> list[WriteReport]:
    """Write to several memories of one decoder at once: one user's text to each, say.

    Chunks of equal length, to streams with equally many short-term rows, share a pass. Each memory gets what
    ``memory.write`` would have given it.

    Args:
        memories: different ones.
        data: for each memory, as for ``Memory.write``.
        sources: for each memory, as there; None: no names.
        progress: show a progress bar; None: for long writes in a terminal.

    Returns:
        For each memory what was written; ``seconds`` are those of the whole call.

    Raises:
        InputError: as ``Memory.write``; or the lists differ in length, or a memory comes twice.
        MemoryMismatchError: as there; or the memories belong to different decoders.
        NonFiniteError: as there; no stream of the pass took its chunk in.
    """
    begun = time.perf_counter()
    sources = [None] * len(memories) if sources is None else sources
    _check(memories, data, sources)
    reports = [WriteReport.nothing(memory.batch_size) for memory in memories]
    streams: list[Stream] = []
    for memory, texts, source, report in zip(memories, data, sources, reports, strict=True):
        streams += _planned(memory, texts, source, report)
    total, turns = sum(len(ids) for stream in streams for ids in stream.chunks), max(len(s.chunks) for s in streams)
    with ExitStack() as held:
        for memory in sorted(memories, key=id):  # in one order everywhere, so that two calls cannot wait for each other
            held.enter_context(memory.write_lock)
        with progress_bar("writing", total, progress, steps=turns) as advance:
            write_streams(streams, advance)
    seconds = time.perf_counter() - begun
    return [evolve(report, seconds=seconds) for report in reports]


@torch.no_grad()
def write_streams(streams: Sequence[Stream], advance: Callable[[int], None] = lambda tokens: None) -> None:
    """Write all chunks of all streams; the caller holds the write locks."""
    for turn in range(max(len(stream.chunks) for stream in streams)):
        present = [stream for stream in streams if turn < len(stream.chunks)]
        chunks = [stream.chunks[turn] for stream in present]
        turns = {id(stream.memory): next_turn(stream.memory.states) for stream in present}
        for group in alike(chunks, [stream.memory.states[stream.row] for stream in present]):
            _write([present[place] for place in group], torch.stack([chunks[place] for place in group]), turns)
            advance(sum(len(chunks[place]) for place in group))


def _check(memories: Sequence[Memory], data: Sequence[Any], sources: Sequence[Any]) -> None:
    if not memories or not len(memories) == len(data) == len(sources):
        raise InputError(
            f"there must be one text, and one source if any, for each memory: got {len(memories)} memories, "
            f"{len(data)} texts and {len(sources)} sources"
        )
    if len({id(memory) for memory in memories}) < len(memories):
        raise InputError("memories must be different ones: give one memory its texts in one entry, or one by one")
    if any(memory.engine is not memories[0].engine for memory in memories):
        raise MemoryMismatchError("memories that are written together must belong to one decoder")


def _planned(memory: Memory, data: Any, source: Any, report: WriteReport) -> list[Stream]:
    rows = to_rows(data, memory.batch_size, memory.tokenizer)
    names = to_names(source, memory.batch_size)
    engine = memory.engine
    check_dtype(memory.dtype, engine.layout.dtype)
    memory.check_writable()
    memory.keep_up()
    config = engine.config
    streams = []
    for row, ids in enumerate(rows):
        chunks: list[Tensor] = []
        if ids is not None:
            check_vocabulary(ids, engine.vocab_size)
            chunks = split(ids, config.chunk_tokens, config.min_chunk_tokens)
        streams.append(Stream(memory, row, chunks, names[row], report))
    return streams


def _write(streams: Sequence[Stream], ids: Tensor, turns: Mapping[int, int]) -> None:
    """One pass: a chunk ``[B, n]`` to streams that read equally many context rows; ``turns`` by id of the memory."""
    engine = streams[0].memory.engine
    states = [stream.memory.states[stream.row] for stream in streams]
    made = _made(engine, streams, engine.encode(states, ids.to(engine.device)), ids.shape[1])
    for memory in {id(stream.memory): stream.memory for stream in streams}.values():
        own = [place for place, stream in enumerate(streams) if stream.memory is memory]
        rows = [made[place] for place in own]
        memory.take_in([streams[place] for place in own], rows, ids[own], turns[id(memory)])


def _made(engine: Engine, streams: Sequence[Stream], blocks: Sequence[Tensor], tokens: int) -> list[Made]:
    """What each stream gets of new rows, per layer ``[B, k, d]``. Raises NonFiniteError for NaN or Inf."""
    of = f"for a chunk of {tokens} tokens"
    for layer, block in enumerate(blocks):
        check_finite(block, f"in layer {layer} {of}")
    wanted = [bool(stream.memory.stores[stream.row].layout.projected_size) for stream in streams]
    projected = [engine.project(layer, block) for layer, block in enumerate(blocks)] if any(wanted) else []
    for layer, block in enumerate(projected):
        check_finite(block, f"in keys and values of layer {layer} {of}")
    return [
        Made(tuple(block[place] for block in blocks), tuple(block[place] for block in projected) if own else ())
        for place, own in enumerate(wanted)
    ]


def keys(engine: Engine, layer: int, hidden: Tensor) -> Tensor | None:
    """Retriever keys of rows ``[m, d]``. Raises NonFiniteError when there is NaN or Inf in them."""
    made = engine.keys(layer, hidden)
    if made is not None:
        check_finite(made, f"in the retriever keys of layer {layer}")
    return made
