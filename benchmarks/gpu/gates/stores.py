"""Gates of the stores: rows on the device come back as those on the CPU do, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from attrs import evolve
from torch import Tensor

from benchmarks.gpu.session import Session
from mplus.config import Component, JsonValue
from mplus.stores import STORES
from mplus.stores.base import MemoryStore, StoreLayout, StoreView
from mplus.stores.tiered import TieredStore
from mplus.testing.drawing import draw_rows

LAYOUT = StoreLayout(layers=2, hidden_size=64, key_size=16, expiry=True, projected_size=32)
ROW = 4 * (64 + 32) + 24
TIGHT: Mapping[str, JsonValue] = {"device_bytes": 2 * 64 * ROW, "host_bytes": 2 * 256 * ROW}
"""Budgets of some rows, so that they come up and make room all the time."""
STORES_TRIED: Mapping[str, dict[str, JsonValue]] = {
    "ram": {"name": "ram"},
    "quantized int8": {"name": "quantized", "group": 16},
    "quantized fp8": {"name": "quantized", "format": "fp8", "group": 16},
    "tiered over ram": {"name": "tiered", "inner": {"name": "ram"}, **TIGHT},
    "tiered over mmap": {"name": "tiered", "inner": {"name": "mmap"}, **TIGHT},
    "tiered, all on the device": {"name": "tiered", "inner": {"name": "ram"}},
    "tiered, none on the device": {"name": "tiered", "inner": {"name": "ram"}, "device_bytes": 0},
    "tiered over quantized": {"name": "tiered", "inner": {"name": "quantized", "group": 16}, **TIGHT},
    "quantized over tiered": {"name": "quantized", "group": 16, "inner": {"name": "tiered", **TIGHT}},
}
LOADED = 200
"""Reads of ``tiered`` while the device computes something else."""


def stores(session: Session) -> None:
    """Do the same to every store on the device and on the CPU."""
    rows = 60 if session.few else 600
    for name, table in STORES_TRIED.items():
        for dtype in (torch.float32,) if session.few else (torch.float32, torch.bfloat16, torch.float16):
            with session.gate(f"store/{name}/{dtype}".replace("torch.", "")) as gate:
                layout = evolve(LAYOUT, dtype=dtype)
                below = STORES.build(Component.of(table), layout)
                store = STORES.build(Component.of(table), evolve(layout, device=session.device))
                for (what, found), (_, expected) in zip(life(store, rows), life(below, rows), strict=True):
                    if found is not None:
                        gate.holds(found.device == session.device, f"{what} is on {found.device}")
                    gate.same(found, expected, what)


def life(store: MemoryStore, rows: int) -> Iterator[tuple[str, Tensor | None]]:
    """Append, remove, read, copy and go back; yield everything that is read, by name."""
    layout, generator = store.layout, torch.Generator().manual_seed(1)
    for layer in range(layout.layers):
        for piece in range(4):
            store.append(layer, draw_rows(layout, rows // 4, 10 * layer + piece))
        store.remove(layer, store.ids(layer)[::7])
        yield from everything(store, layer)
        for number in range(6):  # more than the tiers hold, some of them again
            ids = store.ids(layer)
            picked = ids[torch.randint(len(ids), (40,), generator=generator).to(ids.device)]
            for name, column in store.gather(layer, picked).columns().items():
                yield f"gather {number}, {name}", column
            yield from located(store, layer, picked)
    snapshot, fork = store.snapshot(), store.fork()
    store.append(0, draw_rows(layout, 16, 99))
    fork.remove(1, fork.ids(1)[:5])
    for view in (snapshot, fork, store):
        for layer in range(layout.layers):
            yield from everything(view, layer)
    store.restore(snapshot)
    yield from everything(store, 0)
    yield from everything(store.to(dtype=torch.bfloat16), 0)
    yield from everything(store.to(device=layout.device), 1)


def everything(view: StoreView, layer: int) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the ids and every column of a layer, in one piece, row by row and by chunks."""
    yield "ids", view.ids(layer)
    for name in ("birth", "source", "key", "expiry"):
        yield f"column {name}", view.column(layer, name)
    for name, column in view.gather(layer, view.ids(layer)).columns().items():
        yield f"all of {name}", column
    chunks = view.chunks(layer, "key")
    keys = [(chunk.columns["key"], chunk.live) for chunk in chunks]
    yield "chunks of keys", torch.cat([part if live is None else part[live] for part, live in keys])


def located(view: StoreView, layer: int, ids: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """Yield what rows hold that are located, in the order asked for; nothing where the store does not locate."""
    for name in ("hidden", "projected"):
        location = view.locate(layer, name, ids)
        if location is not None:
            column, places = location.contiguous()
            yield f"located {name}", column.index_select(0, places)


def tiered_under_load(session: Session) -> None:
    """Read rows that are copied on a stream of their own while the device computes something else."""
    options = TieredStore.Options(inner=Component.of({"name": "ram"}), **TIGHT)  # type: ignore[arg-type]
    device, turns = session.device, 20 if session.tiny else LOADED
    with session.gate("tiered/reads beside computation") as gate:
        store = TieredStore(evolve(LAYOUT, device=device), options)
        rows = draw_rows(LAYOUT, 2000, 0)
        ids = store.append(0, rows)
        size = 64 if session.tiny else 4096
        busy = torch.randn(size, size, device=device)
        generator, found, wanted = torch.Generator().manual_seed(0), [], []
        for _ in range(turns):
            places = torch.randint(len(ids), (100,), generator=generator)
            product = busy @ busy
            location = store.locate(0, "hidden", ids[places.to(device)])
            product = product @ busy
            if location is None:
                raise ValueError("the store locates nothing")
            column, where = location.contiguous()
            found.append(column.index_select(0, where))
            wanted.append(places)
            del location, column, where, product  # their memory is used again at once
        for read, places in zip(found, wanted, strict=True):
            gate.same(read, rows.need_hidden()[places], "what was read")
    with session.gate("tiered/both tiers are in use") as gate:
        above = store.tiers()[:2]
        gate.holds(all(tier.rows and tier.hits for tier in above), f"rows and hits of the tiers: {above}")
        gate.holds(store.shared.transfer.pinned == (device.type == "cuda"), "host memory is page-locked on a GPU only")
