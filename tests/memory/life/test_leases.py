"""Who reads now; and what reads hold, whatever becomes of the memory and of its files meanwhile."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.memory import Memory
from tests.memory import tiny
from tests.memory.disks.plain import CONFIGS, PlainModel, chunk

if TYPE_CHECKING:
    from collections.abc import Callable

    from mplus.memory import StreamView


def written(path: Path, model: Any) -> Memory:
    memory = Memory.open(path, model)
    for number in range(9):
        memory.write(chunk(number), source="ab"[number % 2])
        if number in (3, 7):
            memory.checkpoint()
    return memory


def rows_of(view: StreamView) -> dict[str, torch.Tensor]:
    """Copies of all long-term and short-term rows of a view."""
    found = {}
    for layer in range(view.store.layout.layers):
        lists = {"ltm": view.store.gather(layer, view.store.ids(layer)), "stm": view.state.stm[layer]}
        for name, rows in lists.items():
            found |= {f"{name}.{layer}.{column}": tensor.clone() for column, tensor in rows.columns().items()}
    return found


def mapped_deleted(folder: Path) -> set[str]:
    """Files of a folder that are mapped into this process and have no name any more."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if str(folder) in line and line.endswith("(deleted)")}


ENDS: dict[str, Callable[[Memory], object]] = {
    "forget": lambda memory: memory.forget("a"),
    "reset": lambda memory: memory.reset(),
    "close": lambda memory: memory.close(),
    "write on": lambda memory: [memory.write(chunk(n)) for n in range(40)] and memory.checkpoint(),
    "delete": lambda memory: (memory.close(), mplus.delete_memory(memory.directory.path)),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_snapshot_is_read_to_its_end(tmp_path, config, end):
    model = PlainModel(**CONFIGS[config])
    path = tmp_path / "anna"
    written(path, model).close()
    expected = rows_of(Memory.open(path, model, read_only=True).snapshot()[0])
    memory = Memory.open(path, model)  # opened anew: no row of it was touched, let alone read
    view = memory.snapshot()[0]
    before = {file.name for file in path.iterdir()}
    ENDS[end](memory)
    gone = before - ({file.name for file in path.iterdir()} if path.exists() else set())
    del memory
    gc.collect()
    if end != "close":
        assert any(name.startswith("rows-") for name in gone), "files it reads from are removed"
        assert mapped_deleted(tmp_path), "and live on"
    found = rows_of(view)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    del view, found
    gc.collect()
    if end != "close":
        assert not mapped_deleted(tmp_path), "once nothing reads them, they go"


def test_a_decoder_reads_on_while_its_memory_is_deleted(tmp_path):
    model = tiny.variant("paper")
    with Memory.open(tmp_path / "anna", model) as memory:
        memory.write(tiny.ids(300), source="a")
    memory = Memory.open(tmp_path / "anna", model)
    copy = memory.fork()
    with memory.lease(), torch.no_grad():
        assert memory.busy
        memory.close()
        mplus.delete_memory(tmp_path / "anna")
        found = model(tiny.prompts(1), memory=memory).logits
        assert torch.equal(found, model(tiny.prompts(1), memory=copy).logits)
    assert not memory.busy


def test_busy_while_a_read_or_a_write_of_another_thread_goes_on(tmp_path):
    model = PlainModel()
    with Memory.open(tmp_path, model) as memory:
        assert not memory.busy
        with memory.lease() as one, memory.lease():
            one.close()
            one.close()
            assert memory.busy
        assert not memory.busy
        lease = memory.lease()
        assert memory.busy
        assert not memory.fork().busy, "another memory"
        del lease
        gc.collect()
        assert not memory.busy, "an interrupt that lost it left nothing behind"
        begun, go_on = threading.Event(), threading.Event()

        def write() -> None:
            with memory.streams.write_lock:
                begun.set()
                assert go_on.wait(60)

        thread = threading.Thread(target=write)
        thread.start()
        assert begun.wait(60)
        assert memory.busy
        go_on.set()
        thread.join()
        assert not memory.busy
        memory.write(chunk(1))
        leases = [threading.Thread(target=lambda: [memory.lease().close() or memory.busy for _ in range(200)])] * 1
        leases += [threading.Thread(target=lambda: [memory.lease().close() or memory.busy for _ in range(200)])]
        for thread in leases:
            thread.start()
        for thread in leases:
            thread.join()
        assert not memory.busy


def test_what_is_in_ram(tmp_path):
    model = PlainModel()
    memory = written(tmp_path, model)
    store = memory.stores[0]
    assert store.nbytes > store.bytes_in_memory > 0
    assert memory.ram_bytes == memory.nbytes - store.nbytes + store.bytes_in_memory
    memory.checkpoint()
    assert memory.ram_bytes == sum(state.nbytes for state in memory.states) < memory.nbytes
    in_memory = model.new_memory()
    in_memory.write(chunk(1))
    assert in_memory.ram_bytes == in_memory.nbytes
