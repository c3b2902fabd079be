"""Each eviction policy against plain lists: which rows it picks, in which order, and what it remembers."""

from __future__ import annotations

import math
import threading
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mplus.errors import ConfigError
from mplus.eviction.base import topk_rows
from mplus.eviction.lru import LruEviction
from mplus.eviction.reservoir import ReservoirEviction, scramble
from mplus.eviction.ttl import TtlEviction
from mplus.stores.access_log import NEVER, READS, SPARE, AccessLog
from mplus.stores.base import Chunk, StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.strategies import CONFORMANCE

LAYOUT = StoreLayout(layers=2, hidden_size=1, expiry=True)
ROWS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=30)
"""Births and sources (or what else a policy goes by)."""


def stored(births, layer=0, **columns):
    store = RamStore(LAYOUT)
    dtypes = {"expiry": torch.float64}
    columns = {name: torch.tensor(values, dtype=dtypes.get(name)) for name, values in columns.items()}
    store.append(layer, draw_rows(LAYOUT, len(births), 0).replace(birth=torch.tensor(births), **columns))
    return store


# ---------------------------------------------------------------------- choosing


@CONFORMANCE
@example(parts=[[(2, 0, True)], [(1, 0, True), (2, 0, True)]], count=2)  # the lower id is in the chunk looked at last
@given(
    parts=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=7), max_size=5),
    count=st.integers(0, 40),
)
def test_the_first_rows_are_those_a_sort_would_put_first(parts, count):
    chunks, listed, start = [], [], 0
    for part in parts:
        first, second, live = (torch.tensor([row[i] for row in part]) for i in range(3))
        ids = torch.arange(start, start + len(part)) * 2
        start += len(part)
        whole = bool(live.all())  # a chunk may say that there are no holes by having no mask
        chunks.append(Chunk(ids, None if whole else live.bool(), {"birth": first, "source": second}))
        listed += [(*row[:2], number) for row, number in zip(part, ids.tolist(), strict=True) if row[2]]

    def least(chunk):
        births = chunk.columns["birth"] if chunk.live is None else chunk.columns["birth"][chunk.live]
        return min(births.tolist(), default=9)

    for known in (None, least, lambda chunk: 0):
        chosen = topk_rows(chunks, count, lambda chunk: [chunk.columns["birth"], chunk.columns["source"]], known)
        assert chosen.dtype == torch.int64
        assert chosen.tolist() == sorted(number for *_, number in sorted(listed)[:count])


# ---------------------------------------------------------------------- ttl


@CONFORMANCE
@given(rows=ROWS, data=st.data())
def test_ttl_makes_room_by_what_expires_first(rows, data):
    store = stored([birth for birth, _ in rows], expiry=[float(expiry) for _, expiry in rows])
    excess = data.draw(st.integers(1, len(rows)))
    order = sorted(range(len(rows)), key=lambda row_id: (rows[row_id][1], rows[row_id][0], row_id))
    assert TtlEviction().select(store, 0, excess).tolist() == sorted(order[:excess])


@CONFORMANCE
@given(
    expiries=st.lists(st.sampled_from([1.0, 2.0, 2.01, 2.011, 3.5, 9.0]), min_size=1, max_size=20),
    elapsed=st.sampled_from([0.0, 1.0, 1.5]),
    decay=st.sampled_from([0.5, 1.0]),
    spare=st.integers(0, 8),
)
def test_ttl_expires_by_the_published_rule(expiries, elapsed, decay, spare):
    """rf -= decay for all rows; those with rf > 0.01 stay if they are more than K0, else the loss is undone."""
    store = stored([0] * len(expiries), expiry=expiries)
    left = [expiry - (elapsed + decay) for expiry in expiries]
    keep = [rf > 0.01 for rf in left]
    after, gone = TtlEviction(TtlEviction.Options(decay=decay)).expire(store, 0, elapsed, spare)
    if sum(keep) > spare:
        assert (after, gone.tolist()) == (elapsed + decay, [i for i, stays in enumerate(keep) if not stays])
    else:
        assert (after, gone.tolist()) == (elapsed, [])


def test_ttl_says_what_its_options_must_be():
    for options in ({"lifetime": -1.0}, {"decay": "1"}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} must be a number of at least 0"):
            TtlEviction.Options(**options)


# ---------------------------------------------------------------------- lru


@CONFORMANCE
@given(rows=ROWS, reads=st.lists(st.lists(st.integers(0, 29), max_size=4), max_size=100), data=st.data())
def test_lru_takes_what_was_not_used_for_longest(rows, reads, data):
    births = [birth for birth, _ in rows]
    store, access_log, clock = stored(births), AccessLog(), data.draw(st.integers(0, 6))
    used = {number: (birth + 1, 0) for number, birth in enumerate(births)}  # written before any read at that clock
    for number, read in enumerate(reads, 1):
        ids = [row_id % len(rows) for row_id in read]
        clock += data.draw(st.integers(0, 1)) if number % 9 == 0 else 0
        access_log.record(0, torch.tensor(ids, dtype=torch.int64), clock)
        used.update({row_id: max(used[row_id], (clock, number)) for row_id in ids})
    excess = data.draw(st.integers(1, len(rows)))
    order = sorted(range(len(rows)), key=lambda row_id: (used[row_id], births[row_id], row_id))
    assert LruEviction().with_access_log(access_log).select(store, 0, excess).tolist() == sorted(order[:excess])
    other = [
        LruEviction().with_access_log(access_log).select(stored(births, layer=1), 1, excess),
        LruEviction().select(store, 0, excess),
    ]
    unread = sorted(range(len(rows)), key=lambda row_id: (births[row_id], row_id))[:excess]
    assert [ids.tolist() for ids in other] == [sorted(unread)] * 2, "another layer was never read, nor without notes"


def test_notes_can_be_moved_dropped_and_forked():
    access_log, ids = AccessLog(), torch.tensor([3, 5, 8])
    assert access_log.times(1, ids).tolist() == [NEVER] * 3
    access_log.record(1, torch.tensor([8, 3]), 2)
    access_log.record(1, torch.tensor([3]), 2)
    first, second = 2 * READS + 1, 2 * READS + 2
    assert access_log.times(1, ids).tolist() == [second, NEVER, first]
    fork = access_log.fork()
    fork.record(1, torch.tensor([5]), 4)
    store = stored([0] * 4, layer=1)
    store.append(1, draw_rows(LAYOUT, 2, 0))
    store.remove(1, torch.tensor([3]))
    access_log.trim(1, store)
    assert access_log.times(1, ids).tolist() == [second, NEVER, first], "a few notes too many do no harm"
    access_log.record(1, torch.arange(10_000, 10_000 + SPARE + 9), 2)
    access_log.trim(1, store)
    late = torch.tensor([10_000])
    assert access_log.times(1, torch.cat([ids, late])).tolist() == [NEVER, NEVER, NEVER, NEVER]
    access_log.set_times(1, torch.tensor([8]), torch.tensor([first]))
    assert access_log.times(1, ids).tolist() == [NEVER, NEVER, first]
    assert fork.times(1, ids).tolist() == [second, 4 * READS + 1, first]
    access_log.set_times(1, torch.tensor([10, 11, 12]), fork.times(1, ids))
    assert access_log.times(1, torch.tensor([3, 10, 11, 12])).tolist() == [NEVER, second, 4 * READS + 1, first]
    access_log.record(1, torch.tensor([12]), 1)
    assert access_log.times(1, torch.tensor([12])).tolist() == [4 * READS + 2], (
        "time goes on, whatever an old reader says"
    )


def test_readers_in_many_threads_lose_no_note():
    access_log, threads, reads = AccessLog(), 8, 200
    work = [
        threading.Thread(
            target=lambda start=start: [access_log.record(0, torch.tensor([start + i]), 0) for i in range(reads)]
        )
        for start in range(0, threads * reads, reads)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    times = access_log.times(0, torch.arange(threads * reads))
    assert int(times.min()) > 0
    for start in range(0, threads * reads, reads):
        assert bool((times[start : start + reads].diff() > 0).all()), "in one thread later reads are later"


# ---------------------------------------------------------------------- reservoir


def plain_scramble(value):
    """The finaliser of splitmix64 on Python's whole numbers."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


@CONFORMANCE
@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_the_hash_is_that_of_splitmix64(values):
    found = [value % 2**64 for value in scramble(torch.tensor(values, dtype=torch.int64)).tolist()]
    assert found == [plain_scramble(value) for value in values]


def held_after(order, room, seed=0, layer=0):
    """Births that are kept when rows with these births come in this order, two at a time."""
    store, policy = RamStore(LAYOUT), ReservoirEviction(ReservoirEviction.Options(seed=seed))
    for start in range(0, len(order), 2):
        births = torch.tensor(order[start : start + 2])
        rows = draw_rows(LAYOUT, len(births), 0).replace(birth=births, source=torch.zeros_like(births))
        store.append(layer, rows)
        excess = store.count(layer) - room
        if excess > 0:
            store.remove(layer, policy.select(store, layer, excess))
    return set(store.column(layer, "birth").tolist())


@settings(CONFORMANCE, max_examples=20)
@given(order=st.permutations(range(17)), room=st.integers(1, 16), seed=st.integers(0, 3))
def test_a_reservoir_does_not_depend_on_the_order_of_arrival(order, room, seed):
    kept = held_after(order, room, seed)
    assert len(kept) == room
    assert kept == held_after(sorted(order), room, seed)
    assert held_after(sorted(kept), room - 1, seed) < kept if room > 1 else True, "a smaller sample is part of it"


@pytest.mark.parametrize("layer", [0, 1])
def test_a_reservoir_is_a_uniform_sample(layer):
    """How often each of 24 rows, and each of the pairs of neighbours, is among the 6 that stay, over 600 seeds."""
    rows, room, seeds = 24, 6, 600
    single, pairs = Counter(), Counter()
    births = torch.arange(rows)
    store = stored(births.tolist(), layer=layer, source=[0] * rows)
    for seed in range(seeds):
        gone = ReservoirEviction(ReservoirEviction.Options(seed=seed)).select(store, layer, rows - room)
        kept = set(range(rows)) - set(gone.tolist())
        single.update(kept)
        pairs.update(birth for birth in kept if birth + 1 in kept)
    share = room / rows
    # Sampling without replacement: (n - 1) / (n (1 - p)) of the plain sum has the chi-square law of n - 1 degrees.
    chi = sum((single[row] - seeds * share) ** 2 for row in range(rows)) / (seeds * share) / (1 - share)
    chi *= (rows - 1) / rows
    assert abs(chi - (rows - 1)) < 4 * math.sqrt(2 * (rows - 1)), "four standard deviations"
    both = share * (room - 1) / (rows - 1)
    expected = seeds * both * (rows - 1)
    assert abs(sum(pairs.values()) - expected) < 5 * math.sqrt(expected), "neighbours do not stay or go together"


def test_another_seed_layer_or_source_draws_another_sample():
    everything = list(range(40))
    assert held_after(everything, 20) != held_after(everything, 20, seed=1)
    assert held_after(everything, 20) != held_after(everything, 20, layer=1)
    one, other = (stored(everything, source=[number] * 40) for number in (0, 1))
    policy = ReservoirEviction()
    assert policy.select(one, 0, 20).tolist() != policy.select(other, 0, 20).tolist()
