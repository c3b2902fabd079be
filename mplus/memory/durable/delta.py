"""What a write changed, as the payload of a journal record, and the way back from such a payload.

Everything is physical, bit for bit: which rows of a tier stayed and the new rows behind them, the rows appended to the
long-term store and the ids removed from it, counters, clock, sources, and the states of the generators. Replaying a
record needs no decoder and draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.keeping import Stayed
from mplus.memory.stream import Source, StreamState
from mplus.memory.texts import Texts
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.disk.parts import pack, unpack
from mplus.stores.mmap import MmapStore, Note


def encode(
    before: Sequence[StreamState],
    after: Sequence[StreamState],
    stayed: Stayed,
    notes: Sequence[Sequence[Note]],
    draws: Mapping[int, Tensor],
) -> list[bytes | memoryview]:
    """The payload that turns the streams ``before`` into those ``after``.

    Args:
        before, after: states of all streams.
        stayed: what is known of their short-term rows; everything is compared, so that it need not be right.
        notes: what was done to each stream's store, in order.
        draws: state of the generator of every stream whose generator has moved.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        fact: dict[str, Any] = {}
        if old is not new:
            fact = _state(f"{row}", old, new, stayed.get(row), tensors)
        if notes[row]:
            fact["store"] = [_note(f"{row}.store.{place}", note, tensors) for place, note in enumerate(notes[row])]
        if row in draws:
            tensors[f"{row}.generator"] = draws[row]
        if fact:
            facts[str(row)] = fact
    return pack(tensors, {"change": json.dumps(facts, separators=(",", ":"))})


def _state(
    prefix: str, old: StreamState, new: StreamState, stayed: Sequence[Tensor] | None, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    for layer, (rows, now) in enumerate(zip(old.stm, new.stm, strict=True)):
        _tier(f"{prefix}.stm.{layer}", rows, now, None if stayed is None else stayed[layer], tensors)
    for layer, (rows, now) in enumerate(zip(old.pending, new.pending, strict=True)):
        _tier(f"{prefix}.pending.{layer}", rows, now, torch.arange(min(len(rows), len(now))), tensors)
    for layer, hidden in enumerate(new.newest):
        tensors[f"{prefix}.newest.{layer}"] = hidden
    for name, counter in new.counters.items():
        if old.counters.get(name) is not counter:
            tensors[f"{prefix}.counter.{name}"] = counter
    sources = [
        [number, source.name, source.tokens, source.chunks]
        for number, source in enumerate(new.sources)
        if number >= len(old.sources) or source != old.sources[number]
    ]
    fact = {"clock": new.clock, "sources": sources, "counters": list(new.counters)}
    if new.texts is not None:
        fact["texts"] = _texts(f"{prefix}.text", old.texts, new.texts, tensors)
    return fact


def _texts(prefix: str, old: Texts | None, new: Texts, tensors: dict[str, Tensor]) -> int:
    """How many of the old texts stay; the others of the new ones go into ``tensors``."""
    grown = old is not None and old.shared is new.shared and len(old) <= len(new)
    count = len(old) if old is not None and grown else 0
    for name, tensor in Texts.of(new.generator, new.chunks(count)).tensors().items():
        tensors[f"{prefix}.{name}"] = tensor
    return count


def _tier(prefix: str, old: MemoryRows, new: MemoryRows, stay: Tensor | None, tensors: dict[str, Tensor]) -> None:
    """Places in ``old`` of the first rows of ``new``, and the rest of ``new``; nothing where all is as it was."""
    if old is new:
        return
    if stay is None or not _begins_with(new, old, stay):
        stay = torch.arange(0)
    tensors[f"{prefix}.stay"] = stay
    for name, column in new.columns().items():
        tensors[f"{prefix}.{name}"] = column[stay.shape[0] :]


def _begins_with(new: MemoryRows, old: MemoryRows, stay: Tensor) -> bool:
    count, earlier, now = stay.shape[0], old.columns(), new.columns()
    if count > len(new) or earlier.keys() != now.keys():
        return False
    return all(
        earlier[name].dtype == column.dtype
        and earlier[name].shape[1:] == column.shape[1:]
        and _same_bits(earlier[name].index_select(0, stay.to(column.device)), column[:count])
        for name, column in now.items()
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def _note(prefix: str, note: Note, tensors: dict[str, Tensor]) -> list[Any]:
    tensors[f"{prefix}.ids"] = note.ids
    for name, column in ({} if note.rows is None else note.rows.columns()).items():
        tensors[f"{prefix}.{name}"] = column
    return ["remove" if note.rows is None else "append", note.layer]


def apply(
    payload: bytes | memoryview,
    states: list[StreamState],
    stores: Sequence[MmapStore],
    draws: list[Tensor],
    layout: StoreLayout,
    where: str,
) -> None:
    """Make the change in ``payload``: in the lists ``states`` and ``draws``, and to ``stores``.

    Args:
        payload: what ``encode`` made.
        states, stores, draws: all streams, as they were before the change.
        layout: of the rows; says on which device short-term rows are.
        where: names the record in messages.

    Raises:
        MemoryFileError: it does not describe a change of these streams.
    """
    try:
        tensors, metadata = unpack(payload)
        for key, fact in json.loads(metadata["change"]).items():
            row = int(key)
            if "clock" in fact:
                states[row] = _changed(f"{row}", states[row], fact, tensors, layout)
            for place, (what, layer) in enumerate(fact.get("store", ())):
                _repeat(stores[row], what, layer, _columns(tensors, f"{row}.store.{place}."))
        for row in range(len(draws)):
            draws[row] = tensors.get(f"{row}.generator", draws[row])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, MemoryMismatchError) as error:
        raise MemoryFileError(f"{where} does not describe a change of this memory: {error!r}") from error


def _columns(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _changed(
    prefix: str, old: StreamState, fact: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: StoreLayout
) -> StreamState:
    def tier(name: str, rows: Sequence[MemoryRows]) -> tuple[MemoryRows, ...]:
        return tuple(_rows(part, f"{prefix}.{name}.{layer}.", tensors, layout) for layer, part in enumerate(rows))

    newest = tuple(
        tensors[f"{prefix}.newest.{layer}"].to(layout.device)
        for layer in range(layout.layers)
        if f"{prefix}.newest.{layer}" in tensors
    )
    sources = list(old.sources)
    for number, name, tokens, chunks in fact["sources"]:
        sources[number : number + 1] = [Source(name, tokens, chunks)]
    texts = None
    if "texts" in fact:
        more = Texts.from_tensors(_columns(tensors, f"{prefix}.text."), len(sources))
        texts = old.texts
        if texts is None or fact["texts"] != len(texts):
            kept = [] if texts is None else texts.chunks()[: fact["texts"]]
            texts = Texts.of(more.generator, kept)
        for text in more.chunks():
            texts = texts.appended(text)
    counters = {**old.counters, **_columns(tensors, f"{prefix}.counter.")}
    return evolve(
        old,
        stm=tier("stm", old.stm),
        pending=tier("pending", old.pending),
        clock=fact["clock"],
        sources=tuple(sources),
        newest=newest,
        texts=texts,
        counters={name: counters[name] for name in fact["counters"]},
    )


def _rows(old: MemoryRows, prefix: str, tensors: Mapping[str, Tensor], layout: StoreLayout) -> MemoryRows:
    columns = _columns(tensors, prefix)
    if not columns:
        return old
    stay = columns.pop("stay")
    new = MemoryRows.of({name: column.to(layout.device) for name, column in columns.items()})
    return MemoryRows.cat([old.select(stay), new]) if len(stay) else new


def _repeat(store: MmapStore, what: str, layer: int, columns: dict[str, Tensor]) -> None:
    ids = columns.pop("ids")
    if what == "append":
        store.append_as(layer, ids, MemoryRows.of(columns))
    elif what == "remove":
        store.remove(layer, ids)
    else:
        raise ValueError(f"a change of a store must be 'append' or 'remove', got {what!r}")
