"""A memory saved and read back is the same memory: bit for bit, in another process, and whatever it writes next."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import mplus
from mplus.memory.format.manifest import read_manifest
from mplus.memory.format.tensors import Part, write_tensors
from mplus.memory.format.verify import verify
from mplus.memory.transaction import Streams
from mplus.memory.weights_state import made_with
from mplus.stores import STORES
from mplus.stores.ram import RamStore
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

ROOT = Path(__file__).parents[3]
LENGTHS = {"one": [140], "ragged": [140, 20, 70]}

variants = pytest.mark.parametrize("name", tiny.VARIANTS)
batches = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


@variants
@batches
def test_what_is_read_is_what_was_saved(name: str, lengths: list[int], tmp_path: Path) -> None:
    memory = tiny.written(name, lengths)
    before = tiny.content(memory)
    memory.save(tmp_path / "a" / "b")
    tiny.assert_content(memory, before)
    again = mplus.Memory.load(tmp_path / "a" / "b", tiny.variant(name))
    tiny.assert_content(again, before)
    assert [again.sources(row) for row in range(len(lengths))] == [memory.sources(row) for row in range(len(lengths))]
    assert (again.batch_size, again.dtype, again.device) == (memory.batch_size, memory.dtype, memory.device)
    assert verify(tmp_path / "a" / "b") == []


def test_the_variants_exercise_every_part_of_a_memory() -> None:
    memory = tiny.written("published", LENGTHS["ragged"])
    assert len(memory.states[0].pending[0]) > 0
    assert memory.stores[0].count(0) > 0
    assert {"writes_since_merge", "decayed"} == memory.states[0].counters.keys()
    assert memory.states[0].counters["decayed"].any()
    assert {"expiry", "key"} < memory.stores[0].gather(0, memory.stores[0].ids(0)).columns().keys()
    assert tiny.written("paper", LENGTHS["one"]).stores[0].count(0) == tiny.CAPACITY


@variants
@batches
def test_it_goes_on_as_if_never_interrupted(name: str, lengths: list[int], tmp_path: Path) -> None:
    memory = tiny.written(name, lengths)
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, tiny.variant(name))
    more = [tiny.ids(5 + 60 // (row + 1), 500 + row) for row in range(len(lengths))]
    for one in (memory, again):
        one.write(more, source="first")
    tiny.assert_same(again, memory)
    tokens = [generation(name, one) for one in (memory, again)]
    assert tokens[0] == tokens[1]


def generation(name: str, memory: mplus.Memory) -> list[Any]:
    """Generated tokens, and what was retrieved on the way."""
    result = tiny.variant(name).generate(
        tiny.prompts(memory.batch_size),
        memory=memory,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_sources=True,
    )
    rows = [[[(r.layer, r.source, r.age, r.score) for r in layer] for layer in row] for row in result.memory_sources]
    return [result.sequences.tolist(), rows]


CHILD = """
import json, sys
import mplus
from tests.helpers.clock import noon
from tests.memory import tiny
from tests.memory.format import test_files
told = {}
for name in tiny.VARIANTS:
    memory = mplus.Memory.load(f"{sys.argv[1]}/{name}", tiny.variant(name), clock=noon)
    memory.write([tiny.ids(50, 70), tiny.ids(9, 71)], source="later")
    memory.save(f"{sys.argv[1]}/{name}-child")
    told[name] = test_files.generation(name, memory)
print(json.dumps(told))
"""


def test_another_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    memories = {name: tiny.written(name, [150, 33]) for name in tiny.VARIANTS}
    for name, memory in memories.items():
        memory.save(tmp_path / name)
        memory.write([tiny.ids(50, 70), tiny.ids(9, 71)], source="later")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout.splitlines()[-1])
    for name, memory in memories.items():
        tiny.assert_same(mplus.Memory.load(tmp_path / f"{name}-child", tiny.variant(name)), memory)
        assert told[name] == json.loads(json.dumps(generation(name, memory)))


def test_a_random_retriever_draws_the_same_after_a_reload(tmp_path: Path) -> None:
    """The ids of long-term rows change on the way; nothing may hang on them."""
    model = tiny.build(retriever="random")
    memory = model.new_memory()
    memory.write(tiny.ids(600))
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, model)
    assert int(memory.stores[0].ids(0)[0]) != int(again.stores[0].ids(0)[0])
    logits = [model(tiny.prompts(1), memory=one).logits for one in (memory, again)]
    assert torch.equal(*logits)


def test_forgotten_before_saving_is_forgotten_after(tmp_path: Path) -> None:
    memory = tiny.written("paper", [120, 60])
    memory.forget("first", row=0)
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, tiny.variant("paper"))
    assert [[source.name for source in again.sources(row)] for row in (0, 1)] == [
        ["zweite Quelle"],
        ["first", "zweite Quelle"],
    ]
    for one in (memory, again):
        one.write([tiny.ids(40, 3), tiny.ids(40, 4)], source="first")
    tiny.assert_same(again, memory)


def test_a_new_memory_and_one_of_unnamed_sources(tmp_path: Path) -> None:
    model = tiny.variant("paper")
    memory = model.new_memory(seed=9)
    memory.save(tmp_path)
    tiny.assert_same(mplus.Memory.load(tmp_path, model), memory)
    memory.write(tiny.ids(30))
    memory.write(tiny.ids(30), source='"quoted"\n\ud800 \x00')
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, model)
    assert [source.name for source in again.sources()] == [None, '"quoted"\n\ud800 \x00']
    tiny.assert_same(again, memory)


def test_half_precision(tmp_path: Path) -> None:
    model = tiny.build(dtype=torch.bfloat16)
    memory = model.new_memory()
    memory.write(tiny.ids(150))
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, model)
    assert again.dtype == torch.bfloat16
    tiny.assert_same(again, memory)


def test_rows_in_8_bits_are_loaded_as_they_were_read(tmp_path: Path) -> None:
    for name, store in (("a", "quantized"), ("b", {"name": "quantized", "format": "fp8", "group": 3})):
        model = tiny.build(store=store)
        memory = model.new_memory()
        memory.write(tiny.ids(150))
        assert memory.stores[0].count(0) > 0
        memory.save(tmp_path / name)
        tiny.assert_same(mplus.Memory.load(tmp_path / name, model), memory)


def test_other_store_budget_eviction_and_backend_read_it(tmp_path: Path) -> None:
    class OtherStore(RamStore):
        name = "other"

    memory = tiny.written("paper", [150])
    memory.save(tmp_path)
    other = tiny.build(
        store={"name": "ram", "growth": 1.5},
        long_term_tokens=7,
        retrieved_tokens=3,
        backend="reference",
        chunk_tokens=10,
        query_tokens=4,
    )
    again = mplus.Memory.load(tmp_path, other)
    tiny.assert_same(again, memory)
    assert again.stores[0].options.growth == 1.5
    again.write(tiny.ids(10))
    assert again.stores[0].count(0) == 7, "the smaller budget holds from the next write on"
    STORES.register("other", OtherStore)
    try:
        tiny.assert_same(kept := mplus.Memory.load(tmp_path, other, store="other"), memory)
    finally:
        STORES.unregister("other")
    assert type(kept.stores[0]) is OtherStore


def test_the_tokenizer_and_the_device_are_given_anew(tmp_path: Path) -> None:
    memory = tiny.written("paper", [40])
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, tiny.variant("paper"), tokenizer=str.split, device="cpu", eviction="fifo")
    assert again.tokenizer is str.split
    assert mplus.Memory.load(tmp_path, tiny.variant("paper")).tokenizer is None


def test_streams_that_share_a_store_share_it_again(tmp_path: Path) -> None:
    memory = tiny.written("paper", [150, 150])
    parts = memory.streams
    shared = mplus.Memory(
        Streams(parts.engine, parts.states, [parts.stores[0]] * 2, parts.generators, parts.eviction), memory.tokenizer
    )
    for one in (shared.fork(), shared.to(dtype=torch.float64)):
        assert one.stores[0] is one.stores[1]
    shared.save(tmp_path)
    again = mplus.Memory.load(tmp_path, tiny.variant("paper"))
    assert again.stores[0] is again.stores[1]
    tiny.assert_same(again, shared)
    assert verify(tmp_path) == []


def test_the_manifest_tells_what_is_there(tmp_path: Path) -> None:
    memory = tiny.written("published", [150, 20])
    memory.save(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.written_by == mplus.__version__
    facts = {**memory.engine.fingerprint(), **made_with(state.weights for state in memory.states)}
    assert manifest.fingerprint == json.loads(json.dumps(facts))
    assert manifest.layout.dtype == "float32"
    assert manifest.eviction == "fifo"
    for stream, state, store in zip(manifest.streams, memory.states, memory.stores, strict=True):
        assert (stream.mechanism, stream.clock) == ("mplus", state.clock)
        assert (stream.sources, stream.next_source) == (len(state.sources), state.sources.next_number)
        assert list(stream.rows["stm"]) == [len(rows) for rows in state.stm]
        assert list(stream.rows["pending"]) == [len(rows) for rows in state.pending]
        assert list(stream.ltm) == [store.count(layer) for layer in range(3)]
    data = (tmp_path / manifest.data.file).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (manifest.data.bytes, manifest.data.sha256)
    assert manifest.data.sha256[:32] in manifest.data.file
    tensors = load_file(tmp_path / manifest.data.file)  # safetensors' own reader agrees with our writer
    assert tensors.keys() == manifest.data.tensors.keys()
    for name, entry in manifest.data.tensors.items():
        found = tensors[name]
        assert (str(found.dtype), tuple(found.shape)) == (f"torch.{entry.dtype}", entry.shape)
        assert hashlib.sha256(tiny.raw(found)).hexdigest() == entry.sha256


def test_equal_memories_make_equal_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        tiny.written("paper", [60]).save(tmp_path / folder)
    a, b = ({file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("a", "b"))
    assert a == b


def test_one_piece_at_a_time(tmp_path: Path) -> None:
    """A long tensor is never in memory twice, nor are two tensors together."""
    alive: list[weakref.ref[Tensor]] = []

    def pieces() -> Iterator[Tensor]:
        for start in range(3):
            assert [ref() for ref in alive if ref() is not None] == []
            piece = torch.full((2, 3), float(start))
            alive.append(weakref.ref(piece))
            yield piece
            del piece

    parts = [Part(name, torch.float32, (6, 3), pieces) for name in ("x", "y")]
    with (tmp_path / "rows").open("wb") as file:
        write_tensors(file, parts)
    assert len(alive) == 6
    found = load_file(tmp_path / "rows")
    assert found["y"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
