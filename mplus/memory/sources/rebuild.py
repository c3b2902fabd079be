"""Writing a memory again from its kept texts, without those of one source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.checks import check_dtype
from mplus.memory.report import ForgetReport, WriteReport
from mplus.memory.sharing import unshared
from mplus.memory.sources.forget import check_known, held
from mplus.memory.state import StreamState
from mplus.memory.texts import Texts
from mplus.memory.writing.progress import progress_bar
from mplus.memory.writing.write import Stream, write_streams
from mplus.stores.base import MemoryStore

if TYPE_CHECKING:
    from mplus.memory.memory import Memory


def rebuilt(
    memory: Memory, rows: Sequence[int], source: str | None, progress: bool | None
) -> tuple[Memory, ForgetReport]:
    """A memory that was written as ``memory`` was, but without ``source`` in the batch rows ``rows``.

    Chunks that were due at once are again: what shared a pass then shares one now, but for what is left out. So the
    result is, bit for bit, what writing the other texts in the first place would have given. (Passes shared with other
    memories, by ``write_together``, are not shared again; sums over a batch may then round differently.)

    Args:
        memory: stays as it is; the caller holds its write lock.
        rows: batch rows.
        source: a name that was given to ``write``.
        progress: as for ``Memory.forget``.

    Raises:
        InputError: no stream has this source, or the memory does not keep its texts.
        MemoryMismatchError, NonFiniteError: as ``Memory.write``.
    """
    states = memory.states
    check_known(states, rows, source)
    if not memory.keeps_text:
        raise InputError(
            "mode='rebuild' needs the texts that were written, and this memory does not keep them: make memories with "
            "new_memory(keep_text=True), or use mode='drop'"
        )
    memory.keep_up()
    check_dtype(memory.dtype, memory.engine.layout.dtype)
    report = held(states, memory.stores, rows, source)
    left_out = {row: states[row].sources.find(source) for row in rows}
    turns = _turns(states, left_out)
    fresh, written = _blank(memory), WriteReport.nothing(memory.batch_size)
    total = sum(len(ids) for turn in turns for _, _, ids in turn)
    with progress_bar("rebuilding", total, progress, steps=len(turns)) as advance:
        for turn in turns:
            write_streams([Stream(fresh, row, [ids], name, written) for row, name, ids in turn], advance)
    return fresh, evolve(report, rebuilt=sum(written.chunks))


def _turns(
    states: Sequence[StreamState], left_out: dict[int, int | None]
) -> list[list[tuple[int, str | None, Tensor]]]:
    """What is to be written in each turn: batch row, name of the source, ids ``[n]`` int64."""
    due: dict[int, list[tuple[int, str | None, Tensor]]] = {}
    for row, state in enumerate(states):
        for text in () if state.texts is None else state.texts.chunks():
            if text.source != left_out.get(row):
                name = state.sources[text.source].name
                due.setdefault(text.turn, []).append((row, name, text.ids.to(torch.int64)))
    return [due[turn] for turn in sorted(due)]


def _blank(memory: Memory) -> Memory:
    """A memory without rows, like ``memory`` was when it was new: the same draws, kind of store, policy and budget."""
    states, generators = [], []
    for state, store in zip(memory.states, memory.stores, strict=True):
        if state.texts is not None:
            generators.append(torch.Generator().set_state(state.texts.generator))
            states.append(evolve(memory.engine.new_state(store.layout), texts=Texts.of(state.texts.generator)))
    stores = [_emptied(store.fork()) for store in unshared(memory.stores)]
    from mplus.memory.memory import Memory  # not the type of a memory in a directory: this one is kept nowhere

    return Memory(memory.engine, states, stores, generators, memory.eviction, memory.tokenizer, memory.budget)


def _emptied(store: MemoryStore) -> MemoryStore:
    for layer in range(store.layout.layers):
        store.remove(layer, store.ids(layer))
    return store
