"""Random changes of manifests, tensors and journal records, as somebody would make them who wants a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mplus.memory.format.manifest import LIVE_FORMAT, is_memory
from tests.memory.disks import forging

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

PLAIN: list[Any] = [
    float("inf"), float("nan"), 1.0, 0.5, True, None, -1, 0, 1, 7, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 10**400,
    "", "x", "\ud800", [], {}, [1], {"a": 1}, "../x", 1e308,
]  # fmt: skip
WHOLE = [-1, 0, 1, 2, 7, 100, -5, 2**31, -(2**31), 2**45, 2**62, 2**63 - 1, -(2**63)]
NUMBERS: dict[torch.dtype, list[Any]] = {
    torch.bool: [0, 1],
    torch.uint8: [0, 128, 200, 255],
    torch.int32: [-1, 0, 99, 100, 2**31 - 1, -(2**31)],
    torch.int64: WHOLE,
}
FLOATS = [float("nan"), float("inf"), -1.0, 0.0, 1e30]
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.int16,
    torch.uint8, torch.bool,
]  # fmt: skip
NAMES = [
    "x", "0.x", "9.id", "store.0.0.index.cell", "stream.0.state.counter.x", "stream.0.live.9.0", "stream.9.live.0.0",
    "stream.0.usage.9", "stream.0.tail.ids", "stream.0.rows.stm.0.key", "stream.0.rows.stm.0.projected",
    "stream.0.rows.x.0.birth", "stream.0.sources.time", "stream.0.sources.write_id", "0.store.9.ids", "0.tail.ids",
    "0.rows.pending.0.stay", "1.generator",
]  # fmt: skip


def forge_anything(folder: Path, draw: random.Random) -> str:
    """Change something in a folder; says what."""
    told: list[str] = []
    manifest = forging.manifest_of(folder)
    if not is_memory(folder, LIVE_FORMAT):
        if draw.random() < 0.4:
            forging.forge_manifest(folder, lambda plain: told.append(mutate_plain(plain, draw)))
        else:
            forging.forge_data(folder, lambda tensors: told.append(mutate_tensors(tensors, draw)))
        return told[0]
    kind = draw.choice(["manifest", "state", "state", "rows", "record", "record", "facts"])
    record = draw.randrange(len(forging.journal_of(folder)))
    if kind == "manifest":
        forging.forge_manifest(folder, lambda plain: told.append(mutate_plain(plain, draw)))
    elif kind == "state":
        forging.forge_state(folder, lambda tensors: told.append(mutate_tensors(tensors, draw)))
    elif kind == "rows":
        stream = draw.randrange(len(manifest["stores"]))
        place = draw.randrange(len(manifest["stores"][stream]["files"]))
        forging.forge_rows(folder, lambda tensors: told.append(mutate_tensors(tensors, draw)), stream, place)
    elif kind == "record":
        forging.forge_record(folder, record, lambda tensors, _: told.append(mutate_tensors(tensors, draw)))
    else:
        forging.forge_record(folder, record, lambda _, facts: told.append(mutate_plain(facts, draw)))
    return f"{kind} {told[0]}"


def _places(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in plain data."""
    items = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in items:
        yield plain, key
        yield from _places(value)


def mutate_plain(plain: Any, draw: random.Random) -> str:
    """Change one place in plain data."""
    held, key = draw.choice(list(_places(plain)))
    kind, value = draw.choice(["put"] * 6 + ["drop", "near", "double"]), held[key]
    if kind == "drop":
        del held[key]
    elif kind == "near" and type(value) is int:
        held[key] += draw.choice([-1, 1, 2, 100])
    elif kind == "double" and isinstance(value, list) and value:
        value.append(draw.choice(value))
    else:
        held[key] = draw.choice(PLAIN)
    return f"{kind} {key}: {value!r:.40} -> {held.get(key) if isinstance(held, dict) else held!r:.40}"


def mutate_tensors(tensors: forging.Tensors, draw: random.Random) -> str:
    """Change one of some tensors."""
    name = draw.choice(sorted(tensors))
    tensor, number = tensors[name], draw.choice(NUMBERS.get(tensors[name].dtype, FLOATS))
    kind = draw.choice(["one"] * 6 + ["all", "dtype", "shape", "short", "long", "drop", "add", "swap", "flip"])
    if kind == "drop":
        del tensors[name]
    elif kind == "add":
        tensors[added := draw.choice(NAMES)] = tensor.clone()
        return f"add {added}, that is {name}"
    elif kind == "swap":
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensor
        return f"swap {name} and {other}"
    else:
        tensors[name] = _mutated(tensor, kind, number, draw).contiguous()
    return f"{kind} {name} ({number})"


def _mutated(tensor: Tensor, kind: str, number: Any, draw: random.Random) -> Tensor:
    if kind == "all":
        return torch.full_like(tensor, number)
    if kind == "dtype":
        return tensor.to(draw.choice(DTYPES))
    if kind == "shape":
        shape = draw.choice([(1, *tensor.shape), (*tensor.shape, 1), (tensor.numel(),), (0,), (0, 2**40), ()])
        fits = torch.Size(shape).numel() == tensor.numel()
        return tensor.reshape(shape) if fits else torch.zeros(shape, dtype=tensor.dtype)
    if not tensor.dim() or not tensor.numel():
        return torch.zeros(3)
    if kind in {"short", "long", "flip"}:
        return {"short": tensor[:-1], "long": torch.cat([tensor, tensor[-1:]]), "flip": tensor.flip(0)}[kind]
    changed = tensor.clone()
    changed.view(-1)[draw.randrange(changed.numel())] = number
    return changed
