"""Gates of files: what the device saves, a CPU loads, and back; and a memory in a directory whose rows are in tiers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mplus
from benchmarks.gpu.gates.decoders import CHUNK, MECHANISMS, Decoders, ids, written
from benchmarks.gpu.session import Session
from mplus.config import JsonValue
from mplus.memory import Memory


def saving(session: Session) -> None:
    """Open all gates of this file."""
    for name in MECHANISMS:
        three = Decoders.of(name, torch.float32, session.device)
        for kind, writer, reader in (
            ("the device saves, the CPU loads", three.there, three.plain),
            ("the CPU saves, the device loads", three.plain, three.there),
        ):
            with session.gate(f"{name}/{kind}") as gate, tempfile.TemporaryDirectory() as folder:
                memory = written(writer, 4)
                memory.save(Path(folder, "memory"))
                memory.to(next(reader.parameters()).device).save(Path(folder, "moved"))
                loaded, moved = (Memory.load(Path(folder, kind), reader) for kind in ("memory", "moved"))
                gate.same(logits(reader, loaded), logits(reader, moved), "logits")
                plain, exact, _ = three.compute(lambda model: logits(model, written(model, 4)))
                gate.close(logits(reader, loaded), plain, exact)
        with session.gate(f"{name}/a memory in a directory") as gate, tempfile.TemporaryDirectory() as folder:
            there = directory(three.there, Path(folder, "there"), session.device)
            back = Memory.open(Path(folder, "there"), three.plain)
            kept = Memory.open(Path(folder, "here"), three.plain)
            kept.write(ids(4 * CHUNK, 7), source="source", progress=False)
            plain, exact, _ = three.compute(lambda model: logits(model, written_alike(model)))
            gate.close(there, plain, exact)
            gate.close(logits(three.plain, back), plain, exact)
            back.close()
            kept.close()
        with session.gate(f"{name}/save_pretrained") as gate, tempfile.TemporaryDirectory() as folder:
            three.there.save_pretrained(folder, save_base=True)
            again = mplus.from_pretrained(folder, local_files_only=True)
            written(three.there, 4).save(Path(folder, "memory"))
            found, expected = (
                logits(model, Memory.load(Path(folder, "memory"), model)) for model in (again, three.plain)
            )
            gate.same(found, expected, "logits")


def directory(model: Any, path: Path, device: torch.device) -> Tensor:
    """Write into a directory whose rows are read through tiers on the device; return the logits of a prompt."""
    store: JsonValue = {"name": "tiered", "inner": {"name": "mmap"}}
    with Memory.open(path, model, store=store, device=device) as memory:
        memory.write(ids(4 * CHUNK, 7), source="source", progress=False)
        return logits(model, memory)


def written_alike(model: Any) -> Memory:
    """Return a memory in ram with the text of ``directory``."""
    memory: Memory = model.new_memory()
    memory.write(ids(4 * CHUNK, 7), source="source", progress=False)
    return memory


@torch.no_grad()
def logits(model: Any, memory: Memory) -> Tensor:
    """Return the logits of a prompt."""
    found: Tensor = model(ids(11, 100).to(next(model.parameters()).device), memory=memory).logits
    return found
