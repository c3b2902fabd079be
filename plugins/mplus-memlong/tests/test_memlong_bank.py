"""What a MemLong memory keeps, what leaves it, how it is searched, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve
from mplus_memlong.encoders import SentenceEncoder
from mplus_memlong.eviction import _least_found, make_room
from mplus_memlong.options import MemLongOptions
from mplus_memlong.state import MemLongState
from torch import Tensor

import mplus
from mplus.config import Component
from mplus.errors import (
    ConfigError,
    InputError,
    MemoryFullError,
    MemoryMismatchError,
    MissingDependencyError,
    NonFiniteError,
    NotSupported,
)
from mplus.eviction import EVICTION
from mplus.memory.writing.update import WriteContext
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore

Ids = Callable[..., Tensor]


def full_bank(groups: int, recalls: list[tuple[int, int]] = [], pinned: int | None = None) -> Any:  # noqa: B006
    """A state of groups of two tokens, each of a source of its own, with its context: as many fit."""
    state, store = MemLongState.empty(), RamStore(StoreLayout(layers=1, hidden_size=4))
    for number in range(groups):
        found = torch.tensor([2 * to for by, to in recalls if by == number], dtype=torch.int64)
        births, source = torch.arange(2) + state.clock, torch.full((2,), number)
        store.append(0, MemoryRows(torch.zeros(2, 4), births, source))
        state = state.with_group(torch.tensor([number, number]), number, torch.full((3,), float(number)), found)
    context = WriteContext(
        store=store,
        eviction=EVICTION.build(Component("fifo")),
        draw=torch.randperm,
        keys=lambda layer, hidden: None,
        capacity=2 * groups,
        pinned=None if pinned is None else torch.tensor([pinned]),
    )
    return state, context


def left(state: MemLongState, context: WriteContext) -> list[int]:
    """Check that table and rows agree, and return the groups that stayed."""
    births = context.store.column(0, "birth")
    assert births is not None
    assert births.tolist() == [2 * group + place for group in state.group_source.tolist() for place in range(2)]
    return state.group_source.tolist()


# ---------------------------------------------------------------------- who leaves


def test_the_least_found_leave_but_for_the_newest() -> None:
    """Of ten, the oldest leaves whatever its counter is, the newest stays, and then classes of equal counters leave."""
    recalls = [(9, 0), (8, 0), (9, 2), (9, 4), (8, 4), (9, 6), (7, 6), (9, 8)]
    state, context = full_bank(10, recalls)
    assert state.counters.tolist() == [2, 0, 1, 0, 2, 0, 2, 0, 1, 0]
    after, gone = make_room(state, 2, context, MemLongOptions())
    assert gone == 10  # 0 by age, and 1, 3, 5, 7 that nobody found: half of them
    assert left(after, context) == [2, 4, 6, 8, 9]
    assert after.counters.tolist() == [1, 2, 1, 1, 0]  # what 7 found is not counted any more


def test_equal_counters_leave_together() -> None:
    counters = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 2, 0])
    leaving = _least_found(counters, MemLongOptions())
    assert leaving.nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert int(_least_found(counters, MemLongOptions(lower=0, upper=50)).sum()) == 5


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ({"evict": "half"}, [4, 5, 6]),
        ({"evict": "policy"}, [1, 2, 3, 4, 5, 6]),
        ({"evict": "counters", "lower": 0, "upper": 0}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_older_half_leaves_or_as_many_as_must(options: dict[str, Any], stay: list[int]) -> None:
    state, context = full_bank(7)
    after, gone = make_room(state, 2, context, MemLongOptions(**options))
    assert (left(after, context), gone) == (stay, 14 - 2 * len(stay))


@pytest.mark.parametrize("evict", ["counters", "half", "policy"])
def test_groups_of_a_pinned_source_stay(evict: str) -> None:
    state, context = full_bank(4, pinned=0)
    after, _ = make_room(state, 2, context, MemLongOptions(evict=evict))
    assert 0 in left(after, context)
    state, context = full_bank(1, pinned=0)
    with pytest.raises(MemoryFullError):
        make_room(state, 2, context, MemLongOptions(evict=evict))


def test_the_released_eviction_parts_rows_from_groups_and_refuses_odd_ones() -> None:
    state, context = full_bank(6)
    after, gone = make_room(state, 2, evolve(context, capacity=10), MemLongOptions(evict="released"))
    assert (gone, context.store.count(0), after.tokens) == (7, 5, 6)
    state, context = full_bank(5)
    with pytest.raises(NotSupported, match="odd number"):
        make_room(state, 2, context, MemLongOptions(evict="released"))
    state, context = full_bank(6, pinned=3)
    with pytest.raises(MemoryFullError, match="pinned"):
        make_room(state, 2, context, MemLongOptions(evict="released"))


def test_a_memory_counts_what_its_texts_find_and_forgets_that_too(wrap: Any, ids: Ids) -> None:
    model = wrap(config={"retrieved_tokens": 4})
    memory = model.new_memory()
    for number, seed in enumerate((1, 2, 1)):
        memory.write(ids(seed), source=f"s{number}")
    [state] = memory.states
    assert state.recalls.tolist()[-2:] == [[16, 0], [20, 4]]  # the same groups again
    assert int(state.counters[:2].min()) > 0
    memory.forget("s2")
    [state] = memory.states
    assert not bool((state.recalls >= 16).any())
    memory.forget("s0")
    assert memory.states[0].recalls.tolist() == []


def test_a_full_memory_goes_on_within_its_capacity_and_its_budget(wrap: Any, ids: Ids) -> None:
    for config, budget in (({"long_term_tokens": 16}, None), ({}, 24_000)):
        model = wrap(config=config)
        memory = model.new_memory() if budget is None else model.new_memory(bytes_budget=budget)
        for seed in range(20):
            memory.write(ids(seed), source=f"s{seed}")
        [state], [store] = memory.states, memory.stores
        assert state.tokens == store.count(0) > 0
        assert len(state.recalls) <= 2 * state.groups
        if budget is None:
            assert store.count(0) <= 16
        else:
            assert state.nbytes + store.count(0) * store.bytes_per_row <= budget
        with torch.no_grad():
            assert bool(model(ids(30)[None], memory=memory).logits.isfinite().all())


def test_groups_that_were_read_last_stay_where_a_policy_says_so(wrap: Any, ids: Ids) -> None:
    model = wrap(evict="policy", config={"eviction": "lru", "long_term_tokens": 16, "retrieved_tokens": 4})
    memory = model.new_memory()
    for seed in (1, 2):
        memory.write(ids(seed), source=f"s{seed}")
    with torch.no_grad():
        model(ids(1)[None], memory=memory, query_tokens=4)
    memory.write(ids(3, 4), source="s3")
    assert 0 in memory.states[0].group_time.tolist()
    assert memory.states[0].groups == 4


# ---------------------------------------------------------------------- searching


def test_a_large_bank_is_searched_by_an_index_that_follows_it(wrap: Any, ids: Ids) -> None:
    """The index finds what scoring all groups does, for new groups and without forgotten ones."""
    model = wrap(exact_groups=4, config={"retrieved_tokens": 12, "long_term_tokens": 256})
    memory, mechanism = model.new_memory(), model.mplus_engine.mechanism
    assert mechanism.groups.exact == 4

    def check() -> None:
        [view] = memory.streams.versioned_snapshot()[1]
        state = view.state
        for query in torch.randn(3, 32, generator=torch.Generator().manual_seed(2)):
            places, scores = mechanism.groups.best(query, state, view.store, 3)
            every = state.group_key @ query
            assert places.tolist() == every.topk(3).indices.sort().values.tolist()
            assert torch.equal(scores, every[places])

    for seed in range(6):
        memory.write(ids(seed), source=f"s{seed}")
    [old] = memory.streams.versioned_snapshot()[1]
    check()
    memory.write(ids(7), source="s7")
    check()
    index = next(iter(mechanism.groups._indexes.values()))
    assert len(index) == memory.states[0].groups
    assert mechanism.groups.best(torch.ones(32), old.state, old.store, 3)[0].max() < old.state.groups
    memory.forget("s3")
    assert not mechanism.groups._indexes  # nothing of it is left there
    check()


def test_an_index_needs_faiss_and_says_so(wrap: Any, ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(exact_groups=1)
    memory = model.new_memory()
    memory.write(ids(1), source="s")
    monkeypatch.setitem(sys.modules, "mplus.retrievers.ivf", None)
    with pytest.raises(MissingDependencyError, match=r"mplus-memlong\[faiss\]"):
        model(ids(7)[None], memory=memory)


def test_a_search_says_where_groups_come_from() -> None:
    from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer

    tokenizer = load_tokenizer()
    config = {"mechanism": {"name": "memlong", "group_tokens": 8}, "chunk_tokens": 32, "retrieved_tokens": 16}
    model = mplus.wrap(load_decoder(), config, check=False)
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("Tim has a red ball.", source="Tim")
    memory.write("The sun was hot and the flowers were dry.", source="garden")
    found = memory.search("a red ball", k=9)
    assert {one.source for one in found} == {"Tim", "garden"}
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert found[0].source == "Tim"


# ---------------------------------------------------------------------- encoders


class Encoder:
    """Stands in for an encoder of sentence-transformers: letters of a text, counted."""

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, texts: list[str], **options: Any) -> Tensor:
        return torch.tensor([[float(text.count(letter)) for letter in "abcdef"] for text in texts])


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(chr(97 + int(one) % 6) for one in ids)


def test_an_encoder_of_sentence_transformers_reads_the_text(
    wrap: Any, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    model = wrap(encoder="some/encoder", query="text", config={"retrieved_tokens": 4})
    memory = model.new_memory(tokenizer=Letters())
    memory.write(torch.tensor([6, 6, 6, 6, 7, 7, 7, 7]), source="a, then b")
    assert memory.states[0].group_key.tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    with torch.no_grad():
        out = model(torch.tensor([[7, 12, 13]]), memory=memory, output_sources=True)
    [found] = out.memory_sources[0][3]
    assert found.age == 3  # the second group
    assert found.score == pytest.approx(2 / 5**0.5)
    bare = model.new_memory()
    with pytest.raises(InputError, match="needs a tokenizer"):
        bare.write(ids(1), source="s")
    assert bare.states[0].groups == 0
    mechanism = model.mplus_engine.mechanism
    mechanism.encoder = SimpleNamespace(queries=lambda *given: torch.ones(1, 9), compared=lambda q, keys: q)
    with pytest.raises(InputError, match="keys of width 6, and the encoder makes vectors of width 9"):
        model(torch.tensor([[7]]), memory=memory)


def test_an_encoder_that_is_missing_or_gives_no_numbers_changes_nothing(
    wrap: Any, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    model = wrap(encoder="some/encoder")
    memory = model.new_memory(tokenizer=Letters())
    with pytest.raises(MissingDependencyError, match=r"mplus-memlong\[dense\]"):
        memory.write(ids(1), source="s")
    monkeypatch.setattr(SentenceEncoder, "_encoded", lambda self, ids, tokenizer: torch.full((len(ids), 3), torch.nan))
    with pytest.raises(NonFiniteError, match="embedding"):
        memory.write(ids(1), source="s")
    assert (memory.states[0].groups, memory.stores[0].count(0), memory.sources()) == (0, 0, [])


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_layer": 4}, "memory_layer must be one of the layers 0 to 3"),
        ({"read_layers": [0, 2]}, "read_layers must be from memory_layer"),
        ({"read_layers": [2, 4]}, "read_layers must be from memory_layer"),
        ({"read_layers": [3, 2]}, "ascending list"),
        ({"read_layers": []}, "ascending list"),
        ({"group_tokens": 0}, "group_tokens"),
        ({"positions": "Zero"}, "positions must be one of"),
        ({"evict": "lru"}, "evict must be one of"),
        ({"lower": 95}, "lower must be at most upper"),
        ({"bank_dtype": "int8"}, "bank_dtype"),
        ({"encoder": ""}, "encoder"),
        ({"encoder_layer": 4}, "encoder_layer must be one of the layers 0 to 3"),
        ({"encoder": "some/encoder", "encoder_layer": 0}, "leave one of them out"),
        ({"query": "after"}, "query"),
        ({"config": {"retrieved_tokens": 3}}, "retrieved_tokens must be at least group_tokens"),
        ({"config": {"long_term_tokens": 3}}, "long_term_tokens must be at least group_tokens"),
        ({"config": {"eviction": "lru"}}, "only where its option evict is"),
        ({"config": {"retriever": "faiss_ivf"}}, "retriever means nothing"),
        ({"config": {"short_term_tokens": 5}}, "short_term_tokens means nothing"),
        ({"config": {"memory_positions": "constant"}}, "memory_positions means nothing"),
        ({"config": {"memory_tokens_per_chunk": 5}}, "memory_tokens_per_chunk means nothing"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrap: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(**options)


def test_a_bank_of_another_layer_is_refused(wrap: Any, ids: Ids, tmp_path: Any) -> None:
    memory = wrap().new_memory()
    memory.write(ids(1), source="s")
    memory.save(tmp_path)
    with pytest.raises(MemoryMismatchError, match="mechanism"):
        mplus.Memory.load(tmp_path, wrap(memory_layer=2))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("group_length", torch.tensor([4, 5])),
        ("group_time", torch.tensor([4, 0])),
        ("group_key", torch.zeros(1, 32)),
        ("recalls", torch.tensor([[0, 1]])),
        ("token_ids", torch.zeros(8)),
    ],
)
def test_a_table_that_was_damaged_is_told(wrap: Any, ids: Ids, name: str, tensor: Tensor) -> None:
    memory = wrap().new_memory()
    memory.write(ids(1), source="s")
    [state], layout = memory.states, memory.stores[0].layout
    with pytest.raises(MemoryMismatchError):
        MemLongState.from_parts(layout, {}, {**state.tensors(), name: tensor}, clock=state.clock)
    mended, lost = MemLongState.mended(layout, {}, {**state.tensors(), name: tensor})
    assert (len(mended["group_length"]), len(lost)) == (0, 1)


def test_repair_keeps_whole_groups(wrap: Any, ids: Ids) -> None:
    memory = wrap().new_memory()
    memory.write(ids(1), source="s")
    [state], [store] = memory.states, memory.stores
    store.remove(0, store.ids(0)[5:6])
    with pytest.raises(MemoryMismatchError, match="8 tokens"):
        state.check_store(SimpleNamespace(store=store))
    mended, lost = state.mended_with(store)
    assert (mended.group_time.tolist(), store.count(0), len(lost)) == ([0], 4, 2)
