"""One reading of many memories: its batch rows are the streams of different memories, each as it is now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from attrs import define
from transformers import PreTrainedTokenizerBase

from mplus.errors import InputError, MemoryMismatchError, MPlusError, NotSupported, ReadTogetherError
from mplus.hf.adapters.weights import Look
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.reading.checks import is_as_kept
from mplus.hf.reading.forward import check_memory
from mplus.hf.reading.override import mechanism_for_reads
from mplus.hf.reading.reading import Reading
from mplus.memory.memory import Memory
from mplus.memory.recompute import refresh_if_stale
from mplus.memory.state import StreamView


@define(frozen=True, eq=False)
class ReadMemory:
    """One memory of several that are read together, as it was when it was looked at.

    Attributes:
        memory: of one stream.
        version: of the memory then.
        view: its stream then.
        prepared: what reads of this version share; None: its rows are projected by every read.
    """

    memory: Memory
    version: int
    view: StreamView
    prepared: Any


def read_many(engine: DecoderEngine, memories: Sequence[Memory]) -> Reading:
    """Return one reading whose batch row i reads ``memories[i]``, for a forward of as many texts without gradients.

    Each row reads what it reads alone. A memory may come several times. There is no row without a memory, since the
    adapter for reading acts on all rows of a forward: the decoder alone is another forward.

    The first forward is run by ``generate_in(model, reading, model, ...)``.

    Args:
        engine: of the decoder.
        memories: of one stream each; those of one group of ``joint_groups``.

    Raises:
        ReadTogetherError: some cannot be read: they belong to another decoder, have another dtype, several streams, or
            rows that were made with other weights. Its ``errors`` say which.
        NotSupported: the call around passes ``adapter_names``, or memories of different groups were given.
        InputError: there is no memory.
    """
    if not memories:
        raise InputError("there must be at least one memory to read")
    look, taken = _look_at(engine, memories)
    if len(_groups(taken)) > 1:
        raise NotSupported(
            "memories with different tokenizers, or of which some keep keys and values and others do not, are read by "
            "a forward for each kind: sort them with joint_groups"
        )
    mechanism = mechanism_for_reads(engine)
    prepared = [one.prepared for one in taken]
    together = None if prepared[0] is None else mechanism.prepare_together(prepared)
    return Reading(
        mechanism,
        [one.view for one in taken],
        prepared=together,
        look=look,
        memories=memories,
        tokenizer=cast("PreTrainedTokenizerBase | None", memories[0].tokenizer),
        versions=[one.version for one in taken],
    )


def joint_groups(engine: DecoderEngine, memories: Sequence[Memory]) -> list[list[int]]:
    """Return the places in ``memories`` of those that one forward can read together, a list for each forward.

    Raises ReadTogetherError as ``read_many``.
    """
    return _groups(_look_at(engine, memories)[1])


def _groups(taken: Sequence[ReadMemory]) -> list[list[int]]:
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, one in enumerate(taken):
        groups.setdefault((id(one.memory.tokenizer), one.prepared is None), []).append(place)
    return list(groups.values())


def _look_at(engine: DecoderEngine, memories: Sequence[Memory]) -> tuple[Look, list[ReadMemory]]:
    """Return the weights, and the memories as they are now; one that comes several times, as at one moment."""
    look = engine.watch.look()
    if look.names is not None:
        raise NotSupported("adapter_names does not go with reading many memories together: read them one by one")
    found: dict[int, ReadMemory] = {}
    errors: dict[int, Exception] = {}
    for place, memory in enumerate(memories):
        try:
            if id(memory) not in found:
                found[id(memory)] = _taken(engine, memory, look)
        except MPlusError as error:
            errors[place] = error
    if errors:
        raise ReadTogetherError.of(errors, len(memories))
    return look, [found[id(memory)] for memory in memories]


def _taken(engine: DecoderEngine, memory: Memory, look: Look) -> ReadMemory:
    check_memory(engine, memory)
    if len(memory.streams) != 1:
        raise MemoryMismatchError(
            f"a memory that is read together with others must have one stream, got {len(memory.streams)}: choose one "
            "with memory.select"
        )
    refresh_if_stale(memory.streams, look.weights)
    version, (view,) = memory.streams.versioned_snapshot()
    as_kept = is_as_kept(view, look) or not view.store.layout.projected_size
    prepared = engine.prepared(memory, version, look, together=True) if as_kept else None
    return ReadMemory(memory, version, view, prepared)
