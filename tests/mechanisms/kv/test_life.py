"""Writing, reading, saving and forgetting a memory of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BOS
from mplus.errors import ConfigError, InputError, MemoryFileError, MemoryMismatchError
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from tests.mechanisms.kv.memories import CAPACITY, RETRIEVED, logits, text, wrapped
from tests.memory import tiny
from tests.memory.disks import forging
from tests.memory.tiny import rows_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TABLE = ("chunk_length", "chunk_source", "chunk_time", "token_ids")


@pytest.fixture(scope="module")
def model() -> Any:
    return wrapped()


def written(model: Any, rows: int = 1, **options: Any) -> mplus.Memory:
    """Three sources of a chunk and a shorter one each."""
    memory: mplus.Memory = model.new_memory(rows, seed=1, **options)
    for turn in range(3):
        memory.write([text(11, 10 * turn + row) for row in range(rows)], f"s{turn}")
    return memory


def content(memory: mplus.Memory) -> list[Any]:
    """All that the streams hold, as plain numbers; names of sources in the place of their numbers."""
    found = []
    for state, store in zip(memory.states, memory.stores, strict=True):
        names = {number: source.name for number, source in state.sources.items()}
        table = {name: tensor.tolist() for name, tensor in state.tensors().items()}
        table["chunk_source"] = [names[number] for number in table["chunk_source"]]
        rows = [store.gather(layer, store.ids(layer)).columns() for layer in range(store.layout.layers)]
        columns = [{n: c.tolist() for n, c in part.items() if n != "source"} for part in rows]
        found.append((table, columns, state.clock))
    return found


def prompts(rows: int = 1) -> Tensor:
    return tiny.prompts(rows)


def test_rows_are_tokens_and_the_table_says_which(model: Any) -> None:
    memory = written(model)
    (state,), (store,) = memory.states, memory.stores
    assert state.chunk_length.tolist() == [8, 3, 8, 3, 8, 3]
    assert state.chunk_offset.tolist() == state.chunk_time.tolist() == [0, 8, 11, 19, 22, 30]
    assert state.token_ids.tolist() == torch.cat([text(11, 10 * turn) for turn in range(3)]).tolist()
    assert [store.count(layer) for layer in range(store.layout.layers)] == [33] * 3
    assert set(store.gather(0, store.ids(0)).columns()) == {"birth", "source", "projected"}
    assert memory.text_capacity == CAPACITY


def test_an_empty_memory_is_the_decoder(model: Any) -> None:
    ids, memory = prompts(2), model.new_memory(2)
    assert torch.equal(logits(model, ids, memory), logits(model, ids))
    memory = written(model, 2)
    for name in ("s0", "s1", "s2"):
        memory.forget(name)
    assert torch.equal(logits(model, ids, memory), logits(model, ids))


def test_rows_of_a_batch_do_not_see_each_other(model: Any) -> None:
    memory, ids = written(model, 2), prompts(2)
    memory.write([text(5, 77), None], "more")
    both = logits(model, ids, memory)
    for row in range(2):
        alone = logits(model, ids[row : row + 1], memory.select([row]))
        assert float((both[row] - alone[0]).abs().max()) <= tiny.rounding()
    one = logits(model, ids, memory.select([1]))
    assert float((one[1] - both[1]).abs().max()) <= tiny.rounding()


def test_padding_on_the_left_changes_nothing_and_asks_for_nothing(model: Any) -> None:
    memory, ids = written(model, 2), prompts(2)
    held = memory.states[0].token_ids[-3:].long()
    padded = torch.cat([held.expand(2, -1), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = logits(model, padded, memory, attention_mask=mask)[:, 3:]
    assert float((found - logits(model, ids, memory)).abs().max()) <= tiny.rounding()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_it_generates_with_a_cache_as_without(model: Any, options: dict[str, Any]) -> None:
    memory, ids = written(model, 2), prompts(2)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    cached = model.generate(ids, memory=memory, **settings)
    assert cached.tolist() == model.generate(ids, memory=memory, use_cache=False, **settings).tolist()
    assert cached[:, ids.shape[1] :].tolist() != model.generate(ids, **settings)[:, ids.shape[1] :].tolist()


def test_a_text_brings_back_the_chunks_it_shares_words_with(model: Any) -> None:
    memory = written(model)
    wanted = memory.states[0].token_ids[11:18].long()[None]  # of the long chunk of s1
    only = memory.fork()
    for name in ("s0", "s2"):
        only.forget(name)
    assert RETRIEVED < 33
    opened = model.mplus_engine.mechanism.open(
        model.mplus_engine.decoder, memory.snapshot(), mplus.mechanisms.decoder.Text(wanted)
    )
    assert set(range(11, 19)) <= set(opened.own.front.places[0].tolist())
    assert len(opened.own.front.places[0]) <= RETRIEVED


def test_query_tokens_decide_what_comes_back(model: Any) -> None:
    memory = written(model)
    state = memory.states[0]
    ids = torch.cat([state.token_ids[:8], state.token_ids[22:30]]).long()[None]
    first = logits(model, ids, memory, query_tokens=8)
    changed = torch.cat([ids[:, :8], text(8, 5)[None]], 1)
    assert torch.equal(logits(model, changed, memory, query_tokens=8)[:, :8], first[:, :8])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_generation_may_bring_back_other_chunks_on_the_way(model: Any, options: dict[str, Any]) -> None:
    memory = written(model)
    ids = memory.states[0].token_ids[11:16].long()[None]
    settings: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **options}
    made = model.generate(ids, memory=memory, retrieve_every=2, **settings)
    scored = logits(model, made, memory, query_tokens=5, retrieve_every=2)
    if not options:
        assert scored[0, 4:-1].argmax(-1).tolist() == made[0, 5:].tolist()
    text = torch.cat([ids, memory.states[0].token_ids[22:30].long()[None]], 1)  # the second half is of s2
    once, anew = (logits(model, text, memory, query_tokens=5, **every) for every in ({}, {"retrieve_every": 4}))
    assert float((once[:, :8] - anew[:, :8]).abs().max()) < 1e-4
    assert float((once[:, 8:] - anew[:, 8:]).abs().max()) > 1e-2


def test_embeddings_alone_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="needs the ids of a text"):
        model(inputs_embeds=model.get_input_embeddings()(prompts()), memory=written(model))


def test_whole_chunks_leave_at_capacity(model: Any) -> None:
    memory = written(model)
    report = memory.write(text(19, 50), "last")
    (state,), (store,) = memory.states, memory.stores
    assert state.chunk_length.tolist() == [3, 8, 3, 8, 8, 3]
    assert report.evicted_rows == [8 + 3 + 8]
    for layer in range(store.layout.layers):
        assert store.column(layer, "birth").tolist() == list(range(19, 52))


@pytest.mark.parametrize(("begin", "rows"), [([], 11), (None, 12), ([5, 6], 13)])
def test_prefix_rows_count_the_begin_rows_there_are(begin: list[int] | None, rows: int) -> None:
    model = wrapped(begin=begin)
    memory = model.new_memory(seed=1)
    memory.write(text(11))
    [view] = memory.streams.versioned_snapshot()[1]
    assert model.mplus_engine.mechanism.prefix_rows(view) == rows
    out = model(text(4)[None], memory=memory, use_cache=True)
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize("policy", ["fifo", "lru", "reservoir"])
def test_any_policy_lets_chunks_leave_whole(policy: str) -> None:
    model = wrapped(eviction=policy)
    memory = model.new_memory(seed=1)
    for turn in range(8):
        memory.write(text(7 + turn % 3, turn), f"s{turn % 2}")
        logits(model, text(6, turn % 2)[None], memory)
        (state,), (store,) = memory.states, memory.stores
        births = [b for t, n in zip(state.chunk_time, state.chunk_length, strict=True) for b in range(t, t + n)]
        assert [store.column(layer, "birth").tolist() for layer in range(3)] == [births] * 3
        assert state.tokens <= CAPACITY
    assert state.clock > CAPACITY


def test_a_budget_holds_rows_and_table(model: Any) -> None:
    budget = 24_000
    memory = model.new_memory(2, seed=1, bytes_budget=budget)
    most = 0
    for turn in range(24):
        memory.write([text(1 + turn % 8, turn), text(8, turn)], f"s{turn}")
        most = max(most, rows_bytes(memory))
    assert 0.6 * budget <= most <= budget  # a chunk leaves whole, a third of what fits here
    with pytest.raises(ConfigError, match="bytes_budget must be at least"):
        model.new_memory(bytes_budget=2_000)


def test_a_lifetime_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="eviction must be a policy by which rows leave at capacity"):
        model.new_memory(eviction={"name": "ttl", "lifetime": 3})


def test_forgetting_takes_rows_table_and_ids(model: Any) -> None:
    memory, without = written(model), model.new_memory(seed=1)
    for turn in (0, 2):
        without.write(text(11, 10 * turn), f"s{turn}")
    memory.forget("s1")
    (table, rows, clock), (wanted, expected, _) = content(memory)[0], content(without)[0]
    for name in ("chunk_length", "chunk_source", "token_ids"):
        assert table[name] == wanted[name]
    # A chunk is read alone when it is written, so that nothing of s1 is left in the others.
    assert [part["projected"] for part in rows] == [part["projected"] for part in expected]
    assert clock == 33


@pytest.mark.parametrize("context", [None, 0, 1])
def test_a_chunk_is_read_behind_the_newest_of_its_source_alone(context: int | None) -> None:
    model = wrapped(context_chunks=context)
    memory = model.new_memory(seed=1)
    parts = {"a": text(20, 1), "b": text(12, 2)}
    memory.write(parts["a"][:16], "a")
    memory.write(parts["b"], "b")
    memory.write(parts["a"][16:], "a")
    expected = []
    for name, place in (("a", 0), ("a", 8), ("b", 0), ("b", 8), ("a", 16)):
        read = place if context is None else min(place, 8 * context)
        ids = torch.cat([torch.tensor([BOS]), parts[name][place - read : place + 8]])[None]
        with torch.no_grad():
            made = model.mplus_engine.decoder.run(ids, collect={"projected"}).projected
        expected.append([rows[0, 1 + read :] for rows in made])
    store, close = memory.stores[0], {"rtol": 0, "atol": tiny.rounding()}
    for layer in range(store.layout.layers):
        rows = store.gather(layer, store.ids(layer)).columns()["projected"]
        torch.testing.assert_close(rows[:28], torch.cat([e[layer] for e in expected[:4]]), **close)
        if context != 1:
            torch.testing.assert_close(rows[28:], expected[4][layer], **close)
        elif (
            layer == 2
        ):  # what is behind one chunk knows of that before it by its rows: no text read anew tells the same
            assert float((rows[28:] - expected[4][layer]).abs().max()) > 0.01


@pytest.mark.parametrize("context", [None, 1])
@pytest.mark.parametrize("mode", ["drop", "rebuild"])
def test_nothing_of_a_forgotten_source_is_left_in_others(context: int | None, mode: Any) -> None:
    model = wrapped(context_chunks=context)
    memory = written(model, keep_text=True)
    memory.forget("s0", mode=mode)
    again = model.new_memory(seed=1, keep_text=True)
    for turn in (1, 2):
        again.write(text(11, 10 * turn), f"s{turn}")
    assert [part["projected"] for part in content(memory)[0][1]] == [part["projected"] for part in content(again)[0][1]]
    assert mode == "drop" or content(memory) == content(again)


def test_it_is_saved_loaded_opened_and_goes_on(model: Any, tmp_path: Path) -> None:
    memory, ids = written(model, 2), prompts(2)
    memory.save(tmp_path / "saved")
    loaded = mplus.Memory.load(tmp_path / "saved", model)
    assert content(loaded) == content(memory)
    assert torch.equal(logits(model, ids, loaded), logits(model, ids, memory))
    with mplus.Memory.open(tmp_path / "kept", model, batch_size=2, seed=1) as kept:
        for turn in range(3):
            kept.write([text(11, 10 * turn + row) for row in range(2)], f"s{turn}")
    for name in ("s1", "s0"):
        with mplus.Memory.open(tmp_path / "kept", model) as kept:
            assert content(kept) == content(memory)
            for one in (kept, memory):
                one.forget(name)
                one.write([text(4, 60)] * 2, f"after {name}")
    with mplus.Memory.open(tmp_path / "kept", model) as kept:
        assert content(kept) == content(memory)


def test_what_earlier_versions_saved_with_unused_begin_rows_is_loaded(tmp_path: Path) -> None:
    model = wrapped()
    for name in ("begin", "mark"):
        model.mplus.register_parameter(name, torch.nn.Parameter(torch.ones(3, 1, 32)))
    memory = written(model)
    memory.save(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model", save_base=True)
    loaded = mplus.from_pretrained(tmp_path / "model")
    assert not dict(loaded.mplus.named_parameters())
    again = mplus.Memory.load(tmp_path / "memory", loaded)
    assert torch.equal(logits(loaded, prompts(), again), logits(model, prompts(), memory))


def test_a_pool_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="pool means nothing to the mechanism 'kv'"):
        mplus.wrap(tiny.BY_NAME["llama"].build(0), {"mechanism": "kv"}, pool=torch.zeros(3, 4, 32))


def test_a_saved_memory_is_listed_and_forgets_without_a_decoder(model: Any, tmp_path: Path) -> None:
    memory = written(model)
    memory.save(tmp_path / "saved")
    assert [source.name for source in saved_sources(tmp_path / "saved")[0]] == ["s0", "s1", "s2"]
    forget_saved(tmp_path / "saved", "s1")
    memory.forget("s1")
    assert content(mplus.Memory.load(tmp_path / "saved", model)) == content(memory)
    verify(tmp_path / "saved")


def test_a_fork_goes_its_own_way(model: Any) -> None:
    memory = written(model)
    before, fork = content(memory), memory.fork()
    fork.forget("s0")
    fork.write(text(9, 9), "own")
    assert content(memory) == before


def test_a_refused_write_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = written(model)
    before, append = content(memory), type(memory.stores[0]).append

    def broken(self: Any, layer: int, rows: Any) -> Any:
        if layer == 2:
            raise RuntimeError("no room")
        return append(self, layer, rows)

    monkeypatch.setattr(type(memory.stores[0]), "append", broken)
    with pytest.raises(RuntimeError, match="no room"):
        memory.write(text(9, 9), "own")
    monkeypatch.undo()
    assert content(memory) == before
    memory.write(text(9, 9), "own")
    again = written(model)
    again.write(text(9, 9), "own")
    assert content(memory) == content(again)


@pytest.mark.parametrize("store", ["mmap", "tiered", "quantized"])
def test_other_stores_hold_it(store: str, model: Any) -> None:
    memory, ids = written(model, store=store), prompts()
    close = 0.5 if store == "quantized" else tiny.rounding()
    assert float((logits(model, ids, memory) - logits(model, ids, written(model))).abs().max()) <= close


def test_a_table_that_does_not_fit_the_store_is_named(model: Any) -> None:
    memory = written(model)
    (store,) = memory.stores
    store.remove(1, store.ids(1)[:1])
    with pytest.raises(
        MemoryMismatchError, match=r"33 tokens must have as many rows in every layer, got \[33, 32, 33\]"
    ):
        logits(model, prompts(), memory)


def test_repair_takes_out_chunks_that_are_not_whole(model: Any) -> None:
    memory = written(model)
    (state,), (store,) = memory.states, memory.stores
    store.remove(1, store.ids(1)[9:10])
    mended, lost = state.mended_with(store)
    assert mended.chunk_length.tolist() == [8, 8, 3, 8, 3]
    assert [store.count(layer) for layer in range(3)] == [30] * 3
    assert lost[-1] == "1 of 6 chunks, of which rows were lost"
    tensors, told = type(state).mended(store.layout, {}, {**state.tensors(), "chunk_length": torch.zeros(6)})
    assert [len(tensors[name]) for name in TABLE] == [0] * 4
    assert told[0][0] == "the table of chunks, and with it all rows"


def test_a_sound_file_is_repaired_to_itself(model: Any, tmp_path: Path) -> None:
    memory = written(model)
    memory.save(tmp_path / "saved")
    repair(tmp_path / "saved", tmp_path / "again")
    assert content(mplus.Memory.load(tmp_path / "again", model)) == content(memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_length": torch.ones(6)}, r"chunk_length must be torch.int64 \[n\]"),
        ({"chunk_length": torch.tensor([8, 3, 8, 3, 8, 4])}, "6 chunks of 34 tokens"),
        ({"chunk_time": torch.tensor([0, 8, 11, 19, 22, 31])}, "one behind the other in time"),
        ({"token_ids": torch.zeros(2, dtype=torch.int32)}, "33 tokens must have as many sources, times and ids"),
        ({"more": torch.zeros(1)}, "must have the tensors"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(model: Any, change: dict[str, Tensor], message: str) -> None:
    memory = written(model)
    (state,) = memory.states
    with pytest.raises(MemoryMismatchError, match=message):
        type(state).from_parts(memory.stores[0].layout, {}, {**state.tensors(), **change}, clock=33)


def test_a_journal_holds_of_the_table_what_a_chunk_adds(model: Any, tmp_path: Path) -> None:
    """Every chunk of equal length takes equally many bytes, however many there were before."""
    memory = mplus.Memory.open(tmp_path / "memory", model, seed=1)
    assert memory.directory is not None
    memory.write([text(8, 0)], "s0")
    sizes = []
    for turn in range(1, 40):
        before = memory.directory.journal_bytes
        memory.write([text(8, turn)], "s0")
        sizes.append(memory.directory.journal_bytes - before)
    assert max(sizes) - min(sizes) <= 1024, "a block, which records are filled up to"
    expected = content(memory)
    memory.directory.close()  # without a checkpoint: everything comes from the journal
    assert content(mplus.Memory.open(tmp_path / "memory", model, read_only=True)) == expected


@pytest.mark.parametrize("length", [0, 2, 10**6, -1, 1.0])
def test_a_record_that_lies_about_what_grew_is_refused(model: Any, tmp_path: Path, length: float) -> None:
    memory = mplus.Memory.open(tmp_path / "memory", model, seed=1)
    for turn in range(2):
        memory.write([text(8, turn)], "s0")
    assert memory.directory is not None
    memory.directory.close()
    forging.forge_record(tmp_path / "memory", 1, lambda _, facts: facts["0"]["grown"].update(chunk_length=length))
    with pytest.raises(MemoryFileError, match="chunk_length"):
        mplus.Memory.open(tmp_path / "memory", model)
