"""Writing: texts to streams, of one memory or of many, a chunk of each at a time in shared passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError, WriteTogetherError
from mplus.memory.checks import check_dtype, check_finite, check_vocabulary
from mplus.memory.content import MemoryContent
from mplus.memory.engine import Engine
from mplus.memory.report import WriteReport
from mplus.memory.state import alike
from mplus.memory.texts import next_turn
from mplus.memory.writing.chunking import split, to_names, to_rows
from mplus.memory.writing.progress import progress_bar

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


def write(memory: Memory, data: Any, source: Any, progress: bool | None) -> WriteReport:
    """See ``Memory.write``."""
    (report,), errors = _write([memory], [data], [source], progress)
    for error in errors.values():
        raise error
    return report


@overload
def write_together(
    memories: Sequence[Memory],
    data: Sequence[Any],
    sources: Sequence[Any] | None = None,
    *,
    errors: Literal["raise"] = "raise",
    progress: bool | None = None,
) -> list[WriteReport]: ...


@overload
def write_together(
    memories: Sequence[Memory],
    data: Sequence[Any],
    sources: Sequence[Any] | None = None,
    *,
    errors: Literal["return"],
    progress: bool | None = None,
) -> list[WriteReport | Exception]: ...


def write_together(
    memories: Sequence[Memory],
    data: Sequence[Any],
    sources: Sequence[Any] | None = None,
    *,
    errors: Literal["raise", "return"] = "raise",
    progress: bool | None = None,
) -> Sequence[WriteReport | Exception]:
    """Write to several memories of one decoder at once: one user's text to each, say.

    Chunks of equal length, to streams with equally many short-term rows, share a pass. Each memory gets what
    ``memory.write`` would have given it. One that cannot be written to does not keep the others from it.

    Args:
        memories: different ones.
        data: for each memory, as for ``Memory.write``.
        sources: for each memory, as there; None: no names.
        errors: "raise": raise one error when all others have been written. "return": raise none, and return what
            failed in its place, as ``asyncio.gather(..., return_exceptions=True)`` does.
        progress: show a progress bar; None: for long writes in a terminal.

    Returns:
        For each memory what was written; ``seconds`` are those of the whole call.

    Raises:
        WriteTogetherError: some memories failed, each for what ``Memory.write`` would have raised, because it came
            before in the list already (InputError), or because it belongs to another decoder than the first one
            (MemoryMismatchError). Its ``errors`` and ``reports`` tell which ones, and what was written.
        InputError: the lists differ in length, or ``errors`` is something else; nothing was written.

    An interrupt ends the call at once; every memory has the chunks written before it.
    """
    if errors not in ("raise", "return"):
        raise InputError(f"errors must be 'raise' or 'return', got {errors!r}")
    sources = [None] * len(memories) if sources is None else sources
    if isinstance(data, str) or not memories or not len(memories) == len(data) == len(sources):
        raise InputError(
            f"there must be one text, and one source if any, for each memory: got {len(memories)} memories, "
            f"{'one text' if isinstance(data, str) else f'{len(data)} texts'} and {len(sources)} sources"
        )
    reports, failed = _write(memories, data, sources, progress)
    if failed and errors == "raise":
        raise WriteTogetherError.of(reports, failed)
    return [failed.get(place, report) for place, report in enumerate(reports)]


def _write(
    memories: Sequence[Memory], data: Sequence[Any], sources: Sequence[Any], progress: bool | None
) -> tuple[list[WriteReport], dict[int, Exception]]:
    """What was written to each memory, and what failed, by place of the memory."""
    begun = time.perf_counter()
    reports, errors = [WriteReport.nothing(getattr(memory, "batch_size", 0)) for memory in memories], {}
    streams: list[Stream] = []
    places: dict[int, int] = {}
    for place, memory in enumerate(memories):
        try:
            _check_one(memories, place, places)
            streams += _planned(memory, data[place], sources[place], reports[place])
            places[id(memory)] = place
        except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been written
            errors[place] = error
    total = sum(len(ids) for stream in streams for ids in stream.chunks)
    turns = max((len(stream.chunks) for stream in streams), default=0)
    with ExitStack() as held:
        for _, place in sorted(places.items()):  # in one order everywhere, so that two calls cannot wait for each other
            held.enter_context(memories[place].write_lock)
        with progress_bar("writing", total, progress, steps=turns) as advance:
            failed = _write_all(streams, advance)
    errors |= {places[key]: error for key, error in failed.items()}
    seconds = time.perf_counter() - begun
    return [evolve(report, seconds=seconds) for report in reports], dict(sorted(errors.items()))


def write_streams(streams: Sequence[Stream], advance: Callable[[int], None] = lambda tokens: None) -> None:
    """Write all chunks of streams of one memory; the caller holds the write lock. Raises as ``Memory.write``."""
    for error in _write_all(streams, advance).values():
        raise error


@torch.no_grad()
def _write_all(streams: Sequence[Stream], advance: Callable[[int], None]) -> dict[int, Exception]:
    """Write all chunks of all streams; the caller holds the write locks.

    Returns:
        What failed, by id of the memory: nothing more was written to that one.
    """
    failed: dict[int, Exception] = {}
    for turn in range(max((len(stream.chunks) for stream in streams), default=0)):
        present = [stream for stream in streams if turn < len(stream.chunks) and id(stream.memory) not in failed]
        chunks = [stream.chunks[turn] for stream in present]
        turns = {id(stream.memory): next_turn(stream.memory.states) for stream in present}
        for group in alike(chunks, [stream.memory.states[stream.row] for stream in present]):
            sound = [place for place in group if id(present[place].memory) not in failed]
            if sound:
                ids = torch.stack([chunks[place] for place in sound])
                failed |= _write_pass([present[place] for place in sound], ids, turns)
            advance(sum(len(chunks[place]) for place in group))
    return failed


def _check_one(memories: Sequence[Memory], place: int, written: Mapping[int, int]) -> None:
    """Refuse what is no memory, comes a second time, or belongs to another decoder than the first one."""
    memory, first = memories[place], memories[0]
    if not isinstance(memory, MemoryContent):
        raise InputError(f"memories must be instances of mplus.Memory, got {type(memory).__name__}")
    if id(memory) in written:
        raise InputError(
            f"memories must be different ones, and this one comes at place {written[id(memory)]} already: "
            "write its texts one after the other"
        )
    if memory.engine is not getattr(first, "engine", memory.engine):
        raise MemoryMismatchError("memories that are written together must belong to one decoder, that of the first")


def _planned(memory: Memory, data: Any, source: Any, report: WriteReport) -> list[Stream]:
    rows = to_rows(data, memory.batch_size, memory.tokenizer)
    names = to_names(source, memory.batch_size)
    engine = memory.engine
    check_dtype(memory.dtype, engine.layout.dtype)
    memory.check_writable()
    memory.keep_up(writing=[row for row, ids in enumerate(rows) if ids is not None])
    config = engine.config
    streams = []
    for row, ids in enumerate(rows):
        chunks: list[Tensor] = []
        if ids is not None:
            check_vocabulary(ids, engine.vocab_size)
            chunks = split(ids, config.chunk_tokens, config.min_chunk_tokens)
        streams.append(Stream(memory, row, chunks, names[row], report))
    return streams


def _write_pass(streams: Sequence[Stream], ids: Tensor, turns: Mapping[int, int]) -> dict[int, Exception]:
    """Write a chunk ``[B, n]`` in one pass to streams that read equally many context rows.

    Args:
        streams: B of them.
        ids: the chunks.
        turns: by id of the memory.

    Returns:
        What failed, by id of the memory.
    """
    memories = {id(stream.memory): stream.memory for stream in streams}
    try:
        made, finite = _made(streams, ids)
    except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been written
        if len(memories) == 1:
            return dict.fromkeys(memories, error)
        return _write_halves(streams, ids, turns, list(memories))
    failed: dict[int, Exception] = {}
    for key, memory in memories.items():
        own = [place for place, stream in enumerate(streams) if stream.memory is memory]
        rows = [made[place] for place in own]
        try:
            if not finite:
                _check_finite(rows, ids.shape[1])
            memory.take_in([streams[place] for place in own], rows, ids[own], turns[key])
        except Exception as error:  # noqa: BLE001 - as above
            failed[key] = error
    return failed


def _write_halves(
    streams: Sequence[Stream], ids: Tensor, turns: Mapping[int, int], memories: Sequence[int]
) -> dict[int, Exception]:
    """Write in two passes what failed in one: a stream may have spoilt it for the others, or it was too large."""
    failed: dict[int, Exception] = {}
    for part in (memories[: len(memories) // 2], memories[len(memories) // 2 :]):
        own = [place for place, stream in enumerate(streams) if id(stream.memory) in part]
        failed |= _write_pass([streams[place] for place in own], ids[own], turns)
    return failed


def _made(streams: Sequence[Stream], ids: Tensor) -> tuple[list[Made], bool]:
    """What each stream gets of a chunk ``[B, n]``, and whether all of it is finite."""
    engine = streams[0].memory.engine
    states = [stream.memory.states[stream.row] for stream in streams]
    blocks = engine.encode(states, ids.to(engine.device))
    wanted = [bool(stream.memory.stores[stream.row].layout.projected_size) for stream in streams]
    projected = [engine.project(layer, block) for layer, block in enumerate(blocks)] if any(wanted) else []
    finite = all(bool(torch.isfinite(block).all()) for block in (*blocks, *projected))
    made = [
        Made(tuple(block[place] for block in blocks), tuple(block[place] for block in projected) if own else ())
        for place, own in enumerate(wanted)
    ]
    return made, finite


def _check_finite(made: Sequence[Made], tokens: int) -> None:
    """Raise NonFiniteError when there is NaN or Inf in what streams get of a chunk of ``tokens``."""
    of = f"for a chunk of {tokens} tokens"
    for rows in made:
        for layer, block in enumerate(rows.hidden):
            check_finite(block, f"in layer {layer} {of}")
        for layer, block in enumerate(rows.projected):
            check_finite(block, f"in keys and values of layer {layer} {of}")


def keys(engine: Engine, layer: int, hidden: Tensor) -> Tensor | None:
    """Retriever keys of rows ``[m, d]``. Raises NonFiniteError when there is NaN or Inf in them."""
    made = engine.keys(layer, hidden)
    if made is not None:
        check_finite(made, f"in the retriever keys of layer {layer}")
    return made
