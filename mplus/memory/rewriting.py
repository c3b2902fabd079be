"""Rewriting: all rows of a memory computed anew from the ids that it keeps, by other weights than those they are of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from attrs import evolve
from torch import nn

from mplus.errors import InputError, MemoryMismatchError
from mplus.eviction.base import EvictionPolicy
from mplus.memory.engine import Engine, engine_of
from mplus.memory.report import WriteReport, progress_bar
from mplus.memory.sources.rebuild import blank_stores, rebuild_all
from mplus.memory.state import StreamState, StreamView
from mplus.memory.transaction import Streams
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.chunking import check_vocabulary
from mplus.memory.writing.plan import check_dtype
from mplus.memory.writing.update import Update, WriteContext, absorbed_by
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore, StoreView
from mplus.tokenizer import Tokenizer


def rewrite(
    streams: Streams, model: nn.Module | None, tokenizer: Tokenizer | None, progress: bool | None
) -> WriteReport:
    """Compute all rows anew; see ``Memory.rewrite``, and raises as that. The caller holds the write lock."""
    begun, engine = time.perf_counter(), streams.engine if model is None else engine_of(model)
    streams.check_writable()
    report = WriteReport.nothing(len(streams))
    if all(state.kept_chunks() is not None for state in streams.states):
        _check_fits(streams, engine, tokenizer)
        _rewrite_chunks(streams, engine, tokenizer, report, progress)
    elif engine is not streams.engine or not streams.keeps_text or engine.writes_text:
        raise InputError(
            f"rewrite computes rows from the ids of what was written, which memories of the mechanism "
            f"{engine.mechanism.name!r} keep "
            + ("for the decoder they were made with" if streams.keeps_text else "with new_memory(keep_text=True)")
        )
    else:
        rebuild_all(streams, report, progress)
    streams.persistence.check_removed()
    return evolve(report, seconds=time.perf_counter() - begun)


def _check_fits(streams: Streams, engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Raise MemoryMismatchError unless the memory's rows can be those of the decoder.

    Raises InputError for ids that it does not have, and where a tokenizer is needed.
    """
    check_dtype(streams.dtype, engine.dtype)
    own, new = streams.stores[0].layout, engine.layout
    for name in ("layers", "hidden_size", "key_size", "projected_size"):
        if getattr(own, name) != getattr(new, name):
            raise MemoryMismatchError(
                f"{name} of the memory's rows is {getattr(own, name)}, and of the model's {getattr(new, name)}: "
                "rewrite is for other weights of one architecture, so write the texts to a memory of that model"
            )
    if streams.engine.mechanism.name != engine.mechanism.name:
        raise MemoryMismatchError(
            f"the memory is one of the mechanism {streams.engine.mechanism.name!r}, and the model's are of "
            f"{engine.mechanism.name!r}: wrap it for that one"
        )
    for state in streams.states:
        state.check_rewritable(tokenizer)
        for _, _, ids in state.kept_chunks() or ():
            check_vocabulary(ids, engine.vocab_size)


@torch.no_grad()
def _rewrite_chunks(
    streams: Streams, engine: Engine, tokenizer: Tokenizer | None, report: WriteReport, progress: bool | None
) -> None:
    """Write the chunks that the streams keep into stores of their own, and let these take the place of all rows."""
    now, stores = engine.weights(), blank_stores(streams)
    generators = [torch.Generator().set_state(draws) for draws in streams.draws()]
    chunks = [list(state.kept_chunks() or ()) for state in streams.states]
    total = sum(len(ids) for own in chunks for _, _, ids in own)
    with progress_bar("rewriting", total, progress, steps=sum(map(len, chunks))) as advance:
        states = [
            _rewritten(state, store, engine, streams.eviction, generator, tokenizer, now, advance)
            for state, store, generator in zip(streams.states, stores, generators, strict=True)
        ]
    notes = [_moved(*parts) for parts in zip(streams.access_logs, streams.stores, stores, strict=True)]
    other = Streams(
        engine, states, stores, generators, streams.eviction, streams.budget,
        [one for one in notes if one is not None], clock=streams.clock,
    )  # fmt: skip
    before = streams.engine

    def become(found: list[StreamState]) -> None:
        found[:] = states
        streams.engine = engine
        streams.adopt(other)

    try:
        streams.change(become)
    except BaseException:
        if streams.states[0] is not states[0]:  # else it came to be, and an interrupt struck behind that
            streams.engine = before
        raise
    for row, own in enumerate(chunks):
        for _, _, ids in own:
            report.count(row, len(ids), 0, 0)


def _rewritten(
    state: StreamState,
    store: MemoryStore,
    engine: Engine,
    eviction: EvictionPolicy,
    generator: torch.Generator,
    tokenizer: Tokenizer | None,
    now: WeightsState,
    advance: Callable[[int], None],
) -> StreamState:
    """Write the chunks of one stream to an empty ``store``, each with the time and the source that it had."""
    mechanism, draw = engine.mechanism, lambda n: torch.randperm(n, generator=generator)
    new = evolve(state.restarted(engine.new_state(store.layout)).without_computed(), sources=state.sources)
    for source, clock, ids in state.kept_chunks() or ():
        given = evolve(new, clock=clock)
        update = engine.write([StreamView(given, store)], ids[None].to(engine.device), tokenizer, [source])
        Update.check(update, mechanism.name, 1, [store.layout])
        update.check_finite(len(ids), mechanism.name)
        context = WriteContext(store, eviction, draw=draw, keys=engine.keys, ids=ids)
        new = absorbed_by(mechanism, given, update.of(0), source, context).state
        advance(len(ids))
    return evolve(new, clock=state.clock, texts=state.texts, tail=state.tail, weights=now)


def _moved(notes: AccessLog | None, store: StoreView, new: StoreView) -> AccessLog | None:
    """Return the notes on the rows of ``store`` as those on the same rows, in the same order, of ``new``."""
    if notes is None:
        return None
    found = AccessLog()
    for layer in range(store.layout.layers):
        found.set_times(layer, new.ids(layer), notes.times(layer, store.ids(layer)))
    return found
