"""Encode what a write changed as the payload of a journal record, and apply such a payload.

Everything is physical, bit for bit: which rows of a list stayed and the new rows behind them, the rows appended to the
long-term store and the ids removed from it, the mechanism's other tensors, clock, sources, texts, and the states of the
generators. Replaying a record needs no decoder and draws nothing.

The payload is a safetensors text. Its tensors are, of stream i, named as in files (``mplus.memory.format.save``):
``<i>.rows.<list>.<layer>.stay``, places of the rows that stay, and ``<i>.rows.<list>.<layer>.<column>`` of those behind
them; ``<i>.state.<name>``, ``<i>.sources.<column>``, ``<i>.text.<name>`` and ``<i>.tail.<name>``, as far as they have
changed (of a tensor of the state that only grew: what it grew by; of writes with ids, ``<i>.writes.<column>``, those
that are new or have gone on); ``<i>.store.<step>.<column>``, ids included;
``<i>.generator``. The facts in its metadata are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.memory.directory.checkpoint_manifest import PRESENT_NAMES
from mplus.memory.format.columns import check_columns
from mplus.memory.format.earlier import renamed
from mplus.memory.format.entries import MOST_ROWS
from mplus.memory.format.structure import LARGEST
from mplus.memory.sources.source import Source, encoded
from mplus.memory.sources.table import SourceTable
from mplus.memory.sources.writes import WriteLog
from mplus.memory.state import StreamState
from mplus.memory.texts import Texts, generator_in, tail_from, tail_tensors
from mplus.memory.transaction import KeptPositions
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.disk.safetensors_io import pack, unpack
from mplus.stores.mmap import Change, MmapStore


class StreamChange(TypedDict, total=False):
    """The facts of a record on one stream.

    Attributes:
        clock, next_source: of the new state.
        tensors: names of all its tensors.
        grown: of tensors that only grew, how long they were.
        gone: numbers of sources that it lacks.
        texts: how many of the texts there were stay.
        tail: how many texts wait in the new tail.
        no_writes: ids of writes that it lacks, where writes have changed.
        store: what was done to the store, "append" or "remove", and in which layer.
    """

    clock: int
    next_source: int
    tensors: list[str]
    grown: dict[str, int]
    gone: list[int]
    texts: int
    tail: int
    no_writes: list[str]
    store: list[tuple[str, int]]


def encode(
    before: Sequence[StreamState],
    after: Sequence[StreamState],
    kept: KeptPositions,
    notes: Sequence[Sequence[Change]],
    draws: Mapping[int, Tensor],
) -> list[bytes | memoryview]:
    """Return the payload that turns the streams ``before`` into those ``after``.

    Args:
        before, after: states of all streams.
        kept: which rows of their lists stayed, as far as the mechanism says; everything is compared, so that it
            need not be right.
        notes: what was done to each stream's store, in order.
        draws: state of the generator of every stream whose generator has moved.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, StreamChange] = {}
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        fact: StreamChange = {}
        if old is not new:  # states are immutable: the same object says that nothing changed
            fact = _state(f"{row}", old, new, kept.get(row, {}), tensors)
        if notes[row]:
            fact["store"] = [_note(f"{row}.store.{place}", note, tensors) for place, note in enumerate(notes[row])]
        if row in draws:
            tensors[f"{row}.generator"] = draws[row]
        if fact:
            facts[str(row)] = fact
    return pack(tensors, {"change": json.dumps(facts, separators=(",", ":"))})


def _state(
    prefix: str,
    old: StreamState,
    new: StreamState,
    kept: Mapping[str, Sequence[Tensor]],
    tensors: dict[str, Tensor],
) -> StreamChange:
    before = old.row_lists()
    for name, parts in new.row_lists().items():
        for layer, (rows, now) in enumerate(zip(before[name], parts, strict=True)):
            # Of a list that the mechanism says nothing of, it is tried whether rows were only added behind others.
            stay = kept[name][layer] if name in kept else torch.arange(min(len(rows), len(now)))
            _tier(f"{prefix}.rows.{name}.{layer}", rows, now, stay, tensors)
    named = new.tensors()
    grown = _named(f"{prefix}.state", old.tensors(), named, tensors)
    changed, gone = new.sources.changed_since(old.sources)
    if changed:
        tensors.update({f"{prefix}.sources.{name}": column for name, column in encoded(changed).items()})
    fact: StreamChange = {
        "clock": new.clock,
        "tensors": list(named),
        "grown": grown,
        "next_source": new.sources.next_number,
        "gone": gone,
    }
    if new.texts is not None:
        fact["texts"] = _texts(f"{prefix}.text", old.texts, new.texts, tensors)
    if new.tail is not old.tail:
        fact["tail"] = len(new.tail)
        tensors.update({f"{prefix}.tail.{name}": tensor for name, tensor in tail_tensors(new.tail).items()})
    noted, unnoted = new.writes.changed_since(old.writes)
    if noted or unnoted:
        fact["no_writes"] = unnoted
        tensors.update({f"{prefix}.writes.{name}": t for name, t in WriteLog().noting(noted).tensors().items()})
    return fact


def _named(
    prefix: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> dict[str, int]:
    """Put the tensors of a state that have changed into ``tensors``; return how long those were that only grew.

    A table that every chunk adds to would else be written anew with every chunk.
    """
    grown = {}
    for name, now in new.items():
        before = old.get(name)
        if before is now:  # tensors of a state are never written in place: the same object has the same values
            continue
        if before is not None and _only_grew(before, now):
            grown[name] = len(before)
        # Only the new end of a tensor that grew.
        tensors[f"{prefix}.{name}"] = now[grown[name] :] if name in grown else now
    return grown


def _only_grew(old: Tensor, new: Tensor) -> bool:
    same_form = old.dtype == new.dtype and 0 < old.dim() == new.dim() and old.shape[1:] == new.shape[1:]
    return same_form and 0 < len(old) < len(new) and _same_bits(old, new[: len(old)].to(old.device))


def _texts(prefix: str, old: Texts | None, new: Texts, tensors: dict[str, Tensor]) -> int:
    """Return how many of the old texts stay; put the other new ones into ``tensors``."""
    grown = old is not None and old.shared is new.shared and len(old) <= len(new)
    count = len(old) if old is not None and grown else 0
    for name, tensor in Texts.of(new.generator, new.chunks(count)).tensors().items():
        tensors[f"{prefix}.{name}"] = tensor
    return count


def _tier(prefix: str, old: MemoryRows, new: MemoryRows, stay: Tensor, tensors: dict[str, Tensor]) -> None:
    """Put positions in ``old`` of the first rows of ``new``, and the rest of ``new``, into ``tensors``."""
    if old is new:
        return
    if not _begins_with(new, old, stay):  # what the mechanism says is a hint: if it is wrong, all rows are recorded
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
    # As whole numbers: NaN differs from itself, and 0.0 equals -0.0.
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def _note(prefix: str, note: Change, tensors: dict[str, Tensor]) -> tuple[str, int]:
    tensors[f"{prefix}.ids"] = note.ids
    for name, column in ({} if note.rows is None else note.rows.columns()).items():
        tensors[f"{prefix}.{name}"] = column
    return "remove" if note.rows is None else "append", note.layer


def apply(
    payload: bytes | memoryview,
    states: list[StreamState],
    stores: Sequence[MmapStore],
    draws: list[Tensor],
    layout: StoreLayout,
    where: str,
    version: int,
) -> None:
    """Make the change in ``payload``: in the lists ``states`` and ``draws``, and to ``stores``.

    Args:
        payload: what ``encode`` made.
        states, stores, draws: all streams, as they were before the change.
        layout: of the rows; says on which device short-term rows are.
        where: names the record in messages.
        version: of the directory's format.

    Raises:
        MemoryFileError: it does not describe a change of these streams.
    """
    try:
        tensors, metadata = unpack(payload)
        facts: dict[str, StreamChange] = json.loads(metadata["change"])
        if version < PRESENT_NAMES:
            facts, tensors = _upgraded(facts, tensors, [state.sources.next_number for state in states])
        if unknown := facts.keys() - {f"{row}" for row in range(len(states))}:
            raise ValueError(  # noqa: TRY301 - told below, as every fault of a record
                f"it must change streams 0 to {len(states) - 1}, got {sorted(unknown)}"
            )
        for key, fact in facts.items():
            row = int(key)
            if "clock" in fact:
                states[row] = _changed(f"{row}", states[row], fact, tensors, layout)
            for place, (what, layer) in enumerate(fact.get("store", ())):
                _repeat(stores[row], what, layer, _columns(tensors, f"{row}.store.{place}."))
        for row in range(len(draws)):
            if f"{row}.generator" in tensors:
                draws[row] = generator_in(tensors[f"{row}.generator"]).get_state()
    except (
        ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError
    ) as error:  # fmt: skip
        raise MemoryFileError(f"{where} does not describe a change of this memory: {error!r}") from error


def _columns(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _past(name: str, value: int, least: int, most: int = LARGEST) -> int:
    """Return ``value``. Raises ValueError unless it is a whole number from ``least`` on."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return value


def _changed(
    prefix: str, old: StreamState, fact: StreamChange, tensors: Mapping[str, Tensor], layout: StoreLayout
) -> StreamState:
    rows = {
        name: [_rows(part, f"{prefix}.rows.{name}.{layer}.", tensors, layout) for layer, part in enumerate(parts)]
        for name, parts in old.row_lists().items()
    }
    known = old.tensors()
    named = {**known, **_columns(tensors, f"{prefix}.state.")}
    for name, length in fact.get("grown", {}).items():
        if _past(f"the length of {name}", length, 0) != len(known[name]):
            raise ValueError(f"{name} must grow from the {len(known[name])} entries it had, got {length}")
        named[name] = torch.cat([known[name], named[name].to(known[name].device)])
    clock = _past("clock", fact["clock"], old.clock, MOST_ROWS)
    next_source = _past("next_source", fact["next_source"], old.sources.next_number)
    sources = old.sources.without([_past("gone", number, 0) for number in fact["gone"]])
    if changed := _columns(tensors, f"{prefix}.sources."):
        for number, source in SourceTable.from_tensors(changed, next_source).items():
            sources = sources.having(number, source)
    sources = evolve(sources, next_number=next_source)  # larger than all, where a new source has gone again
    numbers, texts, tail = sources.column("number"), None, old.tail
    if "texts" in fact:
        more = Texts.from_tensors(_columns(tensors, f"{prefix}.text."), numbers)
        texts, stay = old.texts, _past("texts", fact["texts"], 0, 0 if old.texts is None else len(old.texts))
        if texts is None or stay != len(texts):
            texts = Texts.of(more.generator, [] if texts is None else texts.chunks()[:stay])
        for text in more.chunks():
            _past("turn", text.turn, texts.last_turn + 1)
            texts = texts.appended(text)
    if "tail" in fact:
        tail = tail_from(_columns(tensors, f"{prefix}.tail."), numbers)
    writes = old.writes
    if "no_writes" in fact:
        noted = WriteLog.from_tensors(_columns(tensors, f"{prefix}.writes."), numbers)
        writes = writes.lacking(fact["no_writes"]).noting(noted)
    return type(old).from_parts(
        layout,
        rows,
        {name: named[name] for name in fact["tensors"]},
        clock=clock,
        sources=sources,
        texts=texts,
        tail=tail,
        writes=writes,
        weights=old.weights,
    )


def _rows(old: MemoryRows, prefix: str, tensors: Mapping[str, Tensor], layout: StoreLayout) -> MemoryRows:
    columns = _columns(tensors, prefix)
    if not columns:
        return old
    stay = columns.pop("stay")
    if stay.dtype != torch.int64 or stay.dim() != 1 or bool((stay.diff() <= 0).any()):
        raise ValueError(f"{prefix}stay must be ascending places of rows")
    check_columns(columns, evolve(layout, expiry=False), prefix)
    new = MemoryRows.of({name: column.to(layout.device) for name, column in columns.items()})
    return MemoryRows.cat([old.select(stay), new]) if len(stay) else new


def _repeat(store: MmapStore, what: str, layer: int, columns: dict[str, Tensor]) -> None:
    ids, layer = columns.pop("ids"), _past("layer", layer, 0, store.layout.layers - 1)
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids must be int64 [n], got {ids.dtype} {list(ids.shape)}")
    if what == "append":
        if len(ids) != len(columns["birth"]) or bool((ids.diff() <= 0).any()):
            raise ValueError("ids of rows must ascend, one for each row")
        if len(ids):
            _past("the first id", int(ids[0]), store.next_ids[layer])
            _past("the last id", int(ids[-1]), 0)
        store.append_as(layer, ids, MemoryRows.of(columns))
    elif what == "remove":
        store.remove(layer, ids)
    else:
        raise ValueError(f"a change of a store must be 'append' or 'remove', got {what!r}")


def _upgraded(
    facts: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], next_numbers: Sequence[int]
) -> tuple[dict[str, StreamChange], dict[str, Tensor]]:
    """Return facts and tensors of a record of format version 1 or 2 in the present form.

    They have the tensors ``<i>.stm.<layer>.<column>``, likewise ``pending``, ``<i>.newest.<layer>`` and
    ``<i>.counter.<name>``, and sources as a list in their facts.

    Args:
        facts, tensors: as they stand in the record.
        next_numbers: of each stream, the number that its next new source gets.
    """
    found = {renamed(f"stream.{name}").removeprefix("stream."): tensor for name, tensor in tensors.items()}
    present: dict[str, StreamChange] = {}
    for row, fact in facts.items():
        changed = dict(fact)
        if "clock" in fact:
            sources = {number: Source(*entry) for number, *entry in changed.pop("sources")}
            if sources:
                found.update({f"{row}.sources.{name}": column for name, column in encoded(sources).items()})
            counters = [f"counter.{name}" for name in changed.pop("counters")]
            newest = [name for name in (n.removeprefix(f"{row}.state.") for n in found) if name.startswith("newest.")]
            changed |= {"tensors": [*newest, *counters], "gone": []}
            changed["next_source"] = max([next_numbers[int(row)], *(number + 1 for number in sources)])
        present[row] = cast("StreamChange", changed)
    return present, found
