"""What holds for every memory after any history: order, survival, accounting, independence."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mplus.rows import NO_SOURCE
from tests.memory import tiny
from tests.memory.counting import LAYERS, counting_memory, numbers, tiers

if TYPE_CHECKING:
    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations

HISTORY = settings(max_examples=max(50, settings().max_examples // 2))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    k = draw(st.integers(1, 4))
    published = {
        "name": "mplus",
        "merge_every": draw(st.integers(1, 4)),
        "lifetime": draw(st.sampled_from([None, 2.0, 4.0])),
    }
    return {
        "memory_tokens_per_chunk": k,
        "short_term_tokens": draw(st.integers(k, 11)),
        "long_term_tokens": draw(st.sampled_from([0, 3, 17, None])),
        "retrieved_tokens": draw(st.integers(0, 4)),
        "drop_per_layer": draw(st.booleans()),
        **draw(
            st.sampled_from(
                [
                    {},
                    {},
                    {"mechanism": "memoryllm"},
                    {"variant": "published", "mechanism": published},
                    {"mechanism": {**published, "ages": "birth"}},
                ]
            )
        ),
    }


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, Any]]:
    names = st.sampled_from(["a", "b", None])
    writes = st.tuples(st.just("write"), st.tuples(st.integers(1, 30), names))
    forgets = st.tuples(st.just("forget"), names)
    return draw(st.lists(st.one_of(writes, writes, writes, forgets, st.just(("reset", None))), min_size=1, max_size=14))


def follow(memory: Memory, history: list[tuple[str, Any]], row: int = 0) -> int:
    """Live through a history; returns the rows evicted per layer as the reports say."""
    evicted = 0
    for what, argument in history:
        known = {source.name for source in memory.sources(row)}
        if what == "write":
            tokens, name = argument
            evicted += memory.write([7] * tokens, source=name).evicted_rows[row]
        elif what == "forget" and argument in known:
            memory.forget(argument)
        elif what == "reset":
            memory.reset()
    return evicted


@HISTORY
@given(config=configs(), history=histories())
def test_order_size_and_place(config: dict[str, Any], history: list[tuple[str, Any]]) -> None:
    memory = counting_memory(**config)
    follow(memory, history)
    (state,), (store,) = memory.states, memory.stores
    release = config.get("variant") == "published"
    for layer in range(LAYERS):
        found = tiers(memory, layer)
        assert len(found["stm"]) <= config["short_term_tokens"]
        assert found["stm"] == sorted(found["stm"]), "oldest first"
        everywhere = list(chain(*found.values()))
        assert len(everywhere) == len(set(everywhere)), "no row is in two places"
        assert set(state.stm[layer].hidden[:, 1].tolist()) <= {layer}, "rows stay in their layer"
        if config["long_term_tokens"] is not None:
            assert len(found["ltm"]) <= config["long_term_tokens"]
        if not release:
            assert (state.stm[layer].birth.diff() > 0).all()
            stored = store.gather(layer, store.ids(layer))
            assert len(set(stored.birth.tolist())) == len(stored)
        for rows in (state.stm[layer], state.pending[layer], store.gather(layer, store.ids(layer))):
            assert bool((rows.birth < max(1, state.clock)).all())
            assert all(number == NO_SOURCE or number in state.sources for number in rows.source.tolist())
    if config.get("mechanism") == "memoryllm" or config["long_term_tokens"] == 0:
        assert not any(map(len, state.pending))
        assert not any(store.count(layer) for layer in range(LAYERS))


EXPIRING_AND_EVICTED = {
    "memory_tokens_per_chunk": 2,
    "short_term_tokens": 4,
    "long_term_tokens": 3,
    "retrieved_tokens": 0,
    "drop_per_layer": False,
    "mechanism": {"name": "mplus", "merge_every": 1, "lifetime": 4.0},
}


@HISTORY
@example(config=EXPIRING_AND_EVICTED, writes=[2, 9, 17])
@given(config=configs(), writes=st.lists(st.integers(1, 30), min_size=1, max_size=10))
def test_nothing_gets_lost(config: dict[str, Any], writes: list[int]) -> None:
    """Everything written is in the STM, pending, in the LTM, evicted, or dropped where there is no LTM."""
    memory = counting_memory(**config)
    evicted = dropped = 0
    for tokens in writes:
        report = memory.write([7] * tokens)
        evicted, dropped = evicted + report.evicted_rows[0], dropped + report.dropped_rows[0]
    made = memory.states[0].clock
    assert made == len(memory.engine.made)
    keeps = config.get("mechanism") != "memoryllm" and config["long_term_tokens"] != 0
    for layer in range(LAYERS):
        found = tiers(memory, layer)
        kept = sum(map(len, found.values()))
        assert kept == made - (evicted if keeps else dropped)
        assert Counter(list(chain(*found.values()))) <= Counter(range(made))
        if evicted == 0 and keeps:
            assert sorted(chain(*found.values())) == list(range(made)), "each row exactly once"


@HISTORY
@given(config=configs(), history=histories(), last=st.integers(1, 8))
def test_the_newest_rows_are_whole(config: dict[str, Any], history: list[tuple[str, Any]], last: int) -> None:
    """Drops spare what was just written: the next write reads the newest K rows."""
    memory = counting_memory(**config)
    follow(memory, history)
    before = len(memory.engine.made)
    memory.write_chunk(torch.full((1, last), 7))
    new = list(range(before, len(memory.engine.made)))
    for layer in range(LAYERS):
        assert tiers(memory, layer)["stm"][-len(new) :] == new
    plan = memory.engine.mechanism.plan_write(memory.states[0], 5)
    present = min(config["memory_tokens_per_chunk"], *(len(rows) for rows in memory.states[0].stm))
    for layer, context in enumerate(plan.context):
        assert context[:, 0].tolist() == tiers(memory, layer)["stm"][-present:]


@HISTORY
@given(config=configs(), history=histories(), name=st.sampled_from(["a", "b", None]))
def test_forgetting_takes_every_row_of_a_source_and_no_other(
    config: dict[str, Any], history: list[tuple[str, Any]], name: str | None
) -> None:
    memory = counting_memory(**config)
    follow(memory, [*history, ("write", (20, name))])
    number = memory.states[0].sources.find(name)
    before = [tiers(memory, layer) for layer in range(LAYERS)]
    mine = [of_source(memory, layer, number) for layer in range(LAYERS)]
    removed = memory.forget(name).rows
    assert removed == sum(map(len, mine))
    for layer in range(LAYERS):
        expected = {tier: [n for n in rows if n not in mine[layer]] for tier, rows in before[layer].items()}
        assert tiers(memory, layer) == expected
        assert of_source(memory, layer, number) == set()
    assert name not in {source.name for source in memory.sources()}
    shortest = min(len(rows) for rows in memory.states[0].stm)
    report = memory.write([7] * 8, source="later")
    k, size = config["memory_tokens_per_chunk"], config["short_term_tokens"]
    longest = max(len(tier["stm"]) - len(gone & set(tier["stm"])) for tier, gone in zip(before, mine, strict=True))
    assert report.dropped_rows == [max(0, longest + k - size)], "the STM grows back before it drops again"
    assert min(len(rows) for rows in memory.states[0].stm) == min(size, shortest + k)


def of_source(memory: Memory, layer: int, number: int) -> set[int]:
    state, store = memory.states[0], memory.stores[0]
    parts = (state.stm[layer], state.pending[layer], store.gather(layer, store.ids(layer)))
    return {n for rows in parts for n in numbers(rows.select(rows.source == number))}


@HISTORY
@given(config=configs(), history=histories(), more=histories())
def test_a_fork_has_a_life_of_its_own_and_the_same_future(
    config: dict[str, Any], history: list[tuple[str, Any]], more: list[tuple[str, Any]]
) -> None:
    memory = counting_memory(**config)
    follow(memory, history)
    content, made = tiny.content(memory), list(memory.engine.made)
    fork, second = memory.fork(), memory.fork()
    follow(fork, more)
    tiny.assert_content(memory, content)
    memory.engine.made[:] = made  # number the rows of each future alike
    follow(memory, more)
    tiny.assert_same(fork, memory)
    tiny.assert_content(second, content)


@HISTORY
@given(config=configs(), history=histories(), more=histories())
def test_reset_gives_a_new_memory(
    config: dict[str, Any], history: list[tuple[str, Any]], more: list[tuple[str, Any]]
) -> None:
    memory, fresh = counting_memory(**config), counting_memory(**config)
    follow(memory, history)
    memory.reset()
    assert memory.sources() == []
    fresh.streams.generators[0].set_state(memory.streams.generators[0].get_state())  # the draws go on
    tiny.assert_same(memory, fresh)
    memory.engine.made.clear()
    follow(memory, more)
    follow(fresh, more)
    tiny.assert_same(memory, fresh)


# ---------------------------------------------------------------------- random drops


@pytest.mark.parametrize("per_layer", [True, False])
def test_layers_drop_independently_or_together(per_layer: bool) -> None:
    memory = counting_memory(memory_tokens_per_chunk=4, short_term_tokens=12, drop_per_layer=per_layer)
    agreeing = 0
    for _ in range(200):
        memory.write([7] * 8)
        stm = [tiers(memory, layer)["stm"] for layer in range(LAYERS)]
        agreeing += stm[0] == stm[1] == stm[2]
    assert agreeing == (200 if not per_layer else 3), "alike while the STM fills; chance is 1 in 495 * 495 each"


def test_a_row_survives_t_writes_with_probability_one_minus_k_by_n_to_the_t() -> None:
    """MemoryLLM section 3.3: each write drops K of N rows, whatever their age."""
    k, n, writes = 4, 16, 2000
    memory = counting_memory(
        memory_tokens_per_chunk=k, short_term_tokens=n, long_term_tokens=0, retrieved_tokens=0, seed=3
    )
    held: Counter[int] = Counter()
    for _ in range(writes):
        memory.write([7] * 8)
        clock = memory.states[0].clock
        for layer in range(LAYERS):
            held.update((clock - 1 - birth) // k for birth in memory.states[0].stm[layer].birth.tolist())
    for age in range(12):
        share = held[age] / (writes * k * LAYERS)
        # The k new rows are not at risk in their own write: N - K older ones face K drops out of N.
        expected = (1 - k / n) ** age
        # Rows leave in each other's place, hence less spread than independent draws have.
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / (writes * LAYERS)) + 1e-3, age


# ---------------------------------------------------------------------- with a real decoder


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_a_stream_of_a_batch_is_the_stream_alone(name: str) -> None:
    model = tiny.variant(name)
    together = model.new_memory(batch_size=3, seed=40)
    texts = [[tiny.ids(length, 9 * turn + row) for row, length in enumerate((100, 30, 55))] for turn in range(2)]
    for turn in texts:
        together.write(turn)
    content = tiny.content(together)
    for row in range(3):
        alone = model.new_memory(seed=40 + row)
        for turn in texts:
            alone.write(turn[row])
        for key, value in tiny.content(alone).items():
            other = content[f"{row}{key[1:]}"]
            if key.endswith(("hidden", "key")):
                torch.testing.assert_close(value, other, atol=tiny.rounding(name), rtol=0)
            else:
                assert tiny.difference({"": value}, {"": other}) == []


def test_a_copy_in_another_dtype() -> None:
    memory = tiny.written("published", [140, 30])
    before = tiny.content(memory)
    half = memory.to(dtype=torch.bfloat16)
    assert (half.dtype, memory.dtype) == (torch.bfloat16, torch.float32)
    for name, value in tiny.content(half).items():
        if name.endswith(("hidden", "key")):
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, before[name].bfloat16())
        else:
            assert tiny.difference({"": value}, {"": before[name]}) == []
    back = half.to(dtype=torch.float32)
    back.write([tiny.ids(40), tiny.ids(40)])
    tiny.assert_content(memory, before)
    same = memory.to("cpu")
    same.forget("first")
    tiny.assert_content(memory, before)


def test_nbytes_counts_the_rows() -> None:
    memory = tiny.variant("paper").new_memory()
    assert memory.nbytes == 0
    memory.write(tiny.ids(16 * 12))
    row = 32 * 4 + 8 + 8
    stm, stored = 3 * tiny.N * row, 3 * memory.stores[0].count(0) * (row + 8 * 4)
    assert stm + stored <= memory.nbytes <= stm + 2 * stored + 3 * 8 * 2 * memory.stores[0].count(0)
    with_pending = tiny.written("published", [140])
    state = with_pending.states[0]
    assert state.nbytes == sum(rows.nbytes for rows in (*state.stm, *state.pending))
    assert len(state.pending[0])


def tensors_of(memory: Memory) -> list[torch.Tensor]:
    """Every tensor that the states of a memory hold."""
    rows = [rows for state in memory.states for rows in (*state.stm, *state.pending)]
    return [column for part in rows for column in part.columns().values()]


@pytest.mark.parametrize("name", tiny.VARIANTS)
@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 9, 12])
def test_rows_keep_nothing_else_alive(name: str, chunks: int) -> None:
    """A row that is a view of what the decoder computed would hold all of that."""
    memory = tiny.variant(name).new_memory(batch_size=2)
    memory.write(tiny.prompts(2, 16 * chunks))
    for tensor in tensors_of(memory):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_sequence_costs_less_than_a_megabyte_beyond_its_rows() -> None:
    model = tiny.variant("paper")
    model.new_memory(batch_size=2).write(tiny.prompts(2, 160))
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        memories = [model.new_memory() for _ in range(10)]
        for memory in memories:
            memory.write(tiny.ids(160))
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    python = (after - before) / len(memories)
    # What Python does not see: tensors that are no rows, and a generator.
    tensors = [*memories[0].states[0].counters.values(), memories[0].streams.generators[0].get_state()]
    rest = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    rows = sum(state.nbytes for state in memories[0].states)
    assert rows > 0
    assert python + rest < 2**20 / 10
