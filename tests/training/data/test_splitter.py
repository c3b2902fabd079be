"""Cutting documents: every length within its bounds, nothing lost but what cannot be cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import ConfigError
from mplus.training.data.counter_rng import CounterRNG, permuted
from mplus.training.data.splitter import SplitRules, cut, longest_sum, split_document

bounds = st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(length=st.integers(0, 400), chunk=bounds, target=bounds, seed=st.integers(0, 99))
def test_every_length_is_within_its_bounds_and_the_document_is_restored(length, chunk, target, seed):
    ids = torch.arange(length)
    split = split_document(ids, SplitRules(chunk_tokens=chunk, target_tokens=target), CounterRNG(seed))
    if length < chunk[0] + target[0]:
        assert split is None
        return
    assert split.contexts
    assert all(chunk[0] <= len(context) <= chunk[1] for context in split.contexts)
    assert target[0] <= len(split.target) <= target[1]
    assert torch.equal(torch.cat([split.skipped, *split.contexts, split.target]), ids)


def sum_over_processes(least: int, most: int, limit: int) -> set[int]:
    """All sums of pieces up to a limit, found by adding."""
    found, edge = {0}, {0}
    while edge:
        edge = {old + piece for old in edge for piece in range(least, most + 1) if old + piece <= limit} - found
        found |= edge
    return found


def test_only_what_no_pieces_can_make_up_is_left_out():
    for least, most in itertools.product(range(1, 9), range(1, 14)):
        if least <= most:
            possible = sum_over_processes(least, most, 60)
            for length in range(61):
                assert longest_sum(length, least, most) == max(n for n in possible if n <= length)
                pieces = cut(torch.arange(length), least, most, CounterRNG(length))
                assert sum(map(len, pieces)) == longest_sum(length, least, most)


def test_a_minimum_of_most_of_the_maximum_leaves_the_front_out():
    # 600 tokens are too many for one chunk of 384 to 512 and too few for two.
    pieces = cut(torch.arange(600), 384, 512, CounterRNG(0))
    assert [piece.tolist() for piece in pieces] == [list(range(88, 600))]


@pytest.mark.parametrize("length", [60, 100, 101])
def test_one_number_makes_all_contexts_equal(length):
    rules = SplitRules(chunk_tokens=16, target_tokens=(5, 20))
    split = split_document(torch.arange(length), rules, CounterRNG(3))
    assert {len(context) for context in split.contexts} == {16}
    assert len(split.skipped) < 16


def test_lengths_are_spread_over_their_range():
    rules = SplitRules(chunk_tokens=(16, 64), target_tokens=(16, 256))
    splits = [split_document(torch.arange(1000), rules, CounterRNG(seed)) for seed in range(300)]
    contexts = [len(context) for split in splits for context in split.contexts[:-2]]
    assert min(contexts) < 19
    assert max(contexts) > 61
    assert abs(sum(contexts) / len(contexts) - 40) < 1.5
    targets = [len(split.target) for split in splits]
    assert min(targets) < 24
    assert max(targets) > 248
    assert abs(sum(targets) / len(targets) - 136) < 12


def test_a_document_no_longer_than_the_longest_target_has_one_chunk_as_target():
    rules = SplitRules(chunk_tokens=(16, 64), target_tokens=(16, 256))
    splits = [split_document(torch.arange(256), rules, CounterRNG(seed)) for seed in range(500)]
    assert max(len(split.target) for split in splits) == 64


def test_the_same_draws_split_alike_and_others_do_not():
    rules = SplitRules(chunk_tokens=(4, 20), target_tokens=(4, 40))

    def lengths(*key):
        return [len(context) for context in split_document(torch.arange(300), rules, CounterRNG(*key)).contexts]

    assert lengths(1, "a") == lengths(1, "a")
    assert len({tuple(lengths(1, name)) for name in "abcdefgh"}) == 8


@pytest.mark.parametrize("value", [0, (5, 4), (1, 2, 3), "16", (1.5, 2), True])
def test_bad_lengths_are_refused(value):
    with pytest.raises(ConfigError, match="chunk_tokens must be a whole number of at least 1, or two of them"):
        SplitRules(chunk_tokens=value)


@given(count=st.integers(1, 300), key=st.integers())
def test_permuted_is_a_permutation(count, key):
    assert sorted(permuted(place, count, key) for place in range(count)) == list(range(count))


def test_permuted_orders_differ_by_key_and_favour_no_place():
    orders = [tuple(permuted(place, 5, key) for place in range(5)) for key in range(2000)]
    assert len(set(orders)) == 120
    for place, value in itertools.product(range(5), range(5)):
        assert abs(sum(order[place] == value for order in orders) - 400) < 90


def test_draws_are_uniform():
    draws = CounterRNG("a")
    found = [draws.between(3, 6) for _ in range(4000)]
    assert all(abs(found.count(value) - 1000) < 130 for value in (3, 4, 5, 6))
    assert set(found) == {3, 4, 5, 6}
    shares = [draws.uniform() for _ in range(2000)]
    assert 0 <= min(shares) < 0.01
    assert 0.99 < max(shares) < 1
