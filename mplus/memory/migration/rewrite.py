"""Make a memory on disk anew for another decoder or tokenizer, from the text that it keeps."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from mplus.errors import InputError, MemoryFileError
from mplus.memory.engine import Engine, engine_of
from mplus.memory.memory import Memory
from mplus.memory.migration.kept import KeptMemory, read_kept
from mplus.memory.migration.units import Unit, kept_units, text_units, with_ids
from mplus.memory.report import WriteReport, progress_bar
from mplus.memory.sources.clock import Clock, read_clock, utc_now
from mplus.memory.sources.source import Source
from mplus.memory.sources.writes import WriteLog, WriteRecord
from mplus.memory.state import StreamState
from mplus.memory.texts import Texts
from mplus.memory.writing.chunking import check_vocabulary
from mplus.memory.writing.once import resumed
from mplus.memory.writing.passes import write_streams
from mplus.memory.writing.plan import StreamWrite, cut_ids, planned, prepare_write
from mplus.stores.disk.files import FileSystem, Folder
from mplus.tokenizer import Tokenizer

UNFINISHED = ".rewriting"
"""Ends the name of the directory in which a memory is made anew, beside the one that it gets."""
PROBE = "The key is under the blue stone, 3.14 m down; it's Lily's."
"""A text by whose ids two tokenizers are told apart."""


def rewrite_memory(
    path: str | Path,
    model: nn.Module,
    to: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    old_tokenizer: Tokenizer | None = None,
    clock: Clock | None = None,
    progress: bool | None = None,
) -> Memory:
    """Make a memory on disk anew for a decoder that cannot read it: another one, or one with another tokenizer.

    What the memory keeps of its texts is written again, source by source as it came: ids where they mean the same to
    both tokenizers, in the same chunks; else the text that the old tokenizer makes of them, cut anew. Names, times,
    expiry, pins, forgotten names and ids of writes stay as they are; what has expired is left out. The memory at
    ``path`` is only read. It takes as long as writing did.

    Memories of the mechanism ``kv`` keep ids in any case, those of text their entries, all others with
    ``new_memory(keep_text=True)``. A memory that lives in a process goes on with ``Memory.rewrite``, where the
    architecture stays the same.

    Args:
        path: of a memory that was saved, or lives there (``Memory.open``); it may be written meanwhile.
        model: a wrapped decoder, whose memory the new one is, with its mechanism and config.
        to: the folder of the new one, which must not be there yet, or be empty. It is a saved memory or a directory to
            ``open``, as the old one is, and is there wholly or not at all: until all is written, it is made in
            ``<to>.rewriting`` beside it, where a further call goes on after a crash. None: the new one is in memory
            only.
        tokenizer: of ``model``; None: the one that was given to ``mplus.wrap``.
        old_tokenizer: the one that the kept ids are of, which no memory says. Where only weights, or the size of the
            vocabulary (``resize_token_embeddings``), have changed, it is ``tokenizer``. It may be left out for a memory
            of text, and for one of this very decoder.
        clock: of the new memory; None: that of the computer.
        progress: show a progress bar; None: for long memories in a terminal.

    Returns:
        The new memory; where ``to`` is given, as ``load`` or ``open`` give it.

    Raises:
        InputError: it keeps no text of something that it holds, which is named; it is not said which tokenizer ids are
            of; ids lie outside the vocabulary; or a memory of text is to be one for the mechanism that it has.
        MemoryFileError: ``path`` cannot be read, or ``to`` cannot be written or is there.
        LiveMemoryError: another process is at it.
        ConfigError: the ``bytes_budget`` of the old memory is too small for the rows of this decoder.
        NonFiniteError, MemoryFullError: as ``Memory.write``. What was written until then is gone on with.

    Example:
        >>> memory = mplus.rewrite_memory("memory", new_model, "memory-2", tokenizer=new, old_tokenizer=old)
    """
    engine, kept, now = engine_of(model), read_kept(path), read_clock(clock or utc_now)
    tokenizer = engine.tokenizer if tokenizer is None else tokenizer
    target = None if to is None else _checked(Path(to), kept)
    kept.check_text()
    same = _keeps_ids(kept, engine, tokenizer, old_tokenizer)
    units = _units(kept, engine, tokenizer, old_tokenizer, now, same=same)
    options: dict[str, Any] = {"tokenizer": tokenizer, "clock": clock, "keep_text": kept.keeps_text}
    if engine.writes_text:
        options["keep_text"] = False
    else:
        options |= {"eviction": kept.eviction, "bytes_budget": kept.bytes_budget}
    if target is None:
        memory: Memory = model.new_memory(len(kept.states), **options)  # type: ignore[operator]
        _begin(memory, kept)
        _write(memory, units, progress)
        _finish(memory, kept, units, same=same)
        return memory
    work = target.with_name(target.name + UNFINISHED)
    memory = _opened(work, model, kept, units, options)
    try:
        _write(memory, units, progress)
        _finish(memory, kept, units, same=same)
        if not kept.lives:
            memory.save(target)
    finally:
        memory.streams.close()  # what waits goes on waiting
    if not kept.lives:
        shutil.rmtree(work)
        return Memory.load(target, model, tokenizer=tokenizer, clock=clock)
    _move(work, target)
    return Memory.open(target, model, tokenizer=tokenizer, clock=clock)


# ---------------------------------------------------------------------- what is to be written


def _checked(target: Path, kept: KeptMemory) -> Path:
    """Return the absolute path of the new memory. Raises MemoryFileError: there is something."""
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MemoryFileError(
            f"{target} must be a folder that is not there yet, or empty, to make {kept.path} anew in: choose another "
            "path (what is there stays whole)"
        )
    return target


def _keeps_ids(kept: KeptMemory, engine: Engine, new: Tokenizer | None, old: Tokenizer | None) -> bool:
    """Return whether kept ids mean to the decoder what they meant to the one before.

    Raises InputError: that is not known; or the memory is one of text, of the decoder's own mechanism.
    """
    if "entries" in kept.states[0].row_lists():
        if kept.mechanism == engine.mechanism.name:
            raise InputError(
                f"{kept.path} is a memory of text, which fits every decoder: use Memory.load, or Memory.open where it "
                "lives there"
            )
        return False
    if old is None:
        if kept.fingerprint.get("base") != engine.fingerprint().get("base"):
            raise InputError(
                f"{kept.path} keeps ids of what was written, and does not say of which tokenizer: pass old_tokenizer=, "
                "the one it was written with, which is tokenizer= where only weights or the size of the vocabulary "
                "have changed"
            )
        return not engine.writes_text
    if new is None:
        raise InputError("the new memory needs the tokenizer of its decoder: pass tokenizer=")
    return not engine.writes_text and (old is new or _agree(old, new))


def _agree(old: Tokenizer, new: Tokenizer) -> bool:
    """Return whether every token of a tokenizer has the same id in another one, and both cut text alike."""
    vocabularies: list[dict[str, int]] = [getattr(one, "get_vocab", dict)() for one in (old, new)]
    grown = bool(vocabularies[0]) and vocabularies[0].items() <= vocabularies[1].items()
    return grown and _ids_of_probe(old) == _ids_of_probe(new)


def _ids_of_probe(tokenizer: Tokenizer | None) -> list[int]:
    return [] if tokenizer is None else list(tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"])


def _units(
    kept: KeptMemory,
    engine: Engine,
    new: Tokenizer | None,
    old: Tokenizer | None,
    now: float,
    *,
    same: bool,
) -> list[Unit]:
    found: list[Unit] = []
    for row, state in enumerate(kept.states):
        if same:
            found += [_fitted(unit, engine, new) for unit in kept_units(row, state, now)]
        else:
            found += text_units(row, state, now, old, int(engine.config.chunk_tokens or 0))
    return with_ids(found, f"{_ids_of_probe(new)}")


def _fitted(unit: Unit, engine: Engine, tokenizer: Tokenizer | None) -> Unit:
    """Return a unit whose chunks are no longer than the decoder takes. Raises InputError: ids it does not know."""
    most, chunks = engine.config.chunk_tokens, list[Tensor]()
    for ids in unit.chunks:
        check_vocabulary(ids, engine.vocab_size)
        chunks += [ids] if most is None or len(ids) <= most else cut_ids(engine, ids, tokenizer)
    return evolve(unit, chunks=chunks)


# ---------------------------------------------------------------------- writing it


def _opened(work: Path, model: nn.Module, kept: KeptMemory, units: Sequence[Unit], options: dict[str, Any]) -> Memory:
    """Return the memory that an earlier call had begun in ``work``, as far as it holds these texts, or a new one."""
    memory = Memory.open(work, model, batch_size=len(kept.states), **options)
    if any(not _goes_on(state, [unit for unit in units if unit.row == row]) for row, state in enumerate(memory.states)):
        memory.streams.close()  # of texts that were changed or forgotten meanwhile
        shutil.rmtree(work)
        memory = Memory.open(work, model, batch_size=len(kept.states), **options)
    if all(not state.sources for state in memory.states):
        _begin(memory, kept)
    return memory


def _goes_on(state: StreamState, units: Sequence[Unit]) -> bool:
    """Return whether all that a stream holds are the first of these units."""
    done = [record.write_id for record in state.writes]
    written = sum(record.tokens for record in state.writes) == sum(source.tokens for source in state.sources)
    return written and done == [unit.write_id for unit in units[: len(done)]]


def _begin(memory: Memory, kept: KeptMemory) -> None:
    """Let new streams that keep texts draw as the old ones did before their first text."""
    streams = memory.streams

    def begin(states: list[StreamState]) -> None:
        for row, (state, old) in enumerate(zip(states, kept.states, strict=True)):
            if old.texts is not None and state.texts is not None:
                streams.generators[row].set_state(old.texts.generator)
                states[row] = evolve(state, texts=Texts.of(old.texts.generator))

    if kept.keeps_text and streams.keeps_text:
        streams.change(begin)


@torch.no_grad()
def _write(memory: Memory, units: Sequence[Unit], progress: bool | None) -> None:
    """Write all units that are not there yet, in order."""
    sizes = [sum(map(len, unit.chunks)) or len(unit.text or "") for unit in units]
    what = "tokens" if all(unit.text is None for unit in units) else "characters"
    with progress_bar("rewriting", sum(sizes), progress, steps=len(units), unit=what) as advance:
        for unit, size in zip(units, sizes, strict=True):
            record = memory.states[unit.row].writes.get(unit.write_id)
            if record is None or not record.is_finished:
                _write_unit(memory, unit)
            advance(size)


def _write_unit(memory: Memory, unit: Unit) -> None:
    streams, report = memory.streams, WriteReport.nothing(memory.batch_size)
    with streams.write_lock:
        if unit.text is not None:
            data = [unit.text if row == unit.row else None for row in range(len(streams))]
            writes = planned(memory, data, unit.source.name, report, unit.facts)
        else:
            prepare_write(streams, [unit.row])
            one = StreamWrite(
                streams, unit.row, unit.chunks, unit.source.name, report, memory.tokenizer, facts=unit.facts,
                short=unit.short,
            )  # fmt: skip
            writes = [evolve(one, chunks=(), texts=unit.chunks) if unit.waits else one]
        begun = time.perf_counter()
        left = [resumed(write, unit.write_id, begun) for write in writes if write.tokens]
        write_streams([write.cut() for write in left])


# ---------------------------------------------------------------------- what is left to do then


def _finish(memory: Memory, kept: KeptMemory, units: Sequence[Unit], *, same: bool) -> None:
    """Give the streams the forgotten names and ids of writes of the old ones, in the place of those of this writing."""

    def finish(states: list[StreamState]) -> None:
        for row, (state, old) in enumerate(zip(states, kept.states, strict=True)):
            sources = state.sources
            for source in old.sources:
                if not source.is_written and sources.find(source.name) is None:
                    sources = sources.having(sources.next_number, Source(source.name))
            writes = _own_writes(state, old, [unit for unit in units if unit.row == row], same=same)
            states[row] = evolve(state, sources=sources, writes=writes)

    memory.streams.change(finish)


def _own_writes(state: StreamState, old: StreamState, units: Sequence[Unit], *, same: bool) -> WriteLog:
    """Return the writes that the user gave ids, as those of the new texts.

    A write whose text is not known apart from others keeps the digest of its old ids: where these are others now, the
    same text under the same id is refused, and not written twice.
    """
    made = {} if same else {unit.record.write_id: unit for unit in units if unit.record is not None}
    found: list[WriteRecord] = []
    for record in old.writes:
        number = state.sources.find(old.sources[record.source].name)
        unit = made.get(record.write_id)
        now = None if unit is None else state.writes.get(unit.write_id)
        if number is not None:
            found.append(evolve(record, source=number) if now is None else evolve(now, write_id=record.write_id))
    return WriteLog().noting(found)


def _move(work: Path, target: Path) -> None:
    """Give the new memory its name. Raises MemoryFileError: that cannot be done."""
    try:
        work.replace(target)
        parent = Folder.open(target.parent)
        try:
            FileSystem().sync_folder(parent)
        finally:
            parent.close()
    except OSError as error:
        raise MemoryFileError(
            f"{work} holds the new memory, and could not be given the name {target}: {error.strerror or error}: move "
            "it there"
        ) from error
