"""Length bins: read from tables, drawn by their shares."""

from __future__ import annotations

import pytest

from mplus.errors import ConfigError
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.data.sampler import Bucket, as_buckets, bucket_of, choose

TABLES = [{"at_least": 100, "share": 1}, {"at_least": 10, "below": 50, "share": 3}]


def test_tables_become_bins_by_length():
    bins = as_buckets(TABLES)
    assert bins == (Bucket(at_least=10, below=50, share=3), Bucket(at_least=100, share=1))
    assert as_buckets(bins) == bins
    assert [bucket_of(bins, tokens) for tokens in (9, 10, 49, 50, 99, 100, 10**6)] == [None, 0, 0, None, None, 1, 1]


def test_bins_are_drawn_by_share():
    bins = as_buckets(TABLES)
    drawn = [choose(bins, CounterRNG(seed)) for seed in range(4000)]
    assert abs(drawn.count(0) - 3000) < 120
    assert set(drawn) == {0, 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("long", "bins must be a list of tables"),
        ([3], "bins must be a list of tables"),
        ([{"from": 3}], "'from' is not a field of Bucket"),
        ([{"at_least": 5, "below": 5}], r"below must be more than at_least \(5\) in a bin, got 5"),
        ([{"share": 0}], "share must be a number of at least"),
        ([{"below": 11}, {"at_least": 10}], "bins must not overlap, and that of 0 to 10 tokens and that of 10 tokens"),
        ([{"at_least": 5}, {"at_least": 10}], "bins must not overlap"),
    ],
)
def test_bad_bins_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        as_buckets(value)
