"""Which document a stream takes when, and of which length."""

from __future__ import annotations

import pytest

from mplus.errors import ConfigError
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.data.sampler import Bucket, DocumentSampler, as_buckets, choose
from tests.helpers.letters import Stream, library

COUNT = 23
BOOKS = library(*range(1, COUNT + 1))


def order(documents=BOOKS, *, seed=3, shuffle=True, streams=None, block=4):
    return DocumentSampler(documents, seed=seed, shuffle=shuffle, streams=streams, block=block)


def taken(order, stream, places):
    return [order.take(stream, place)[0] for place in places]


def test_every_stream_goes_through_all_documents_in_an_order_of_its_own():
    passes = [
        taken(order(), stream, range(epoch * COUNT, (epoch + 1) * COUNT)) for stream in (0, 7) for epoch in (0, 1)
    ]
    for epoch, found in zip((0, 1, 0, 1), passes, strict=True):
        assert sorted(found) == list(range(epoch * COUNT, (epoch + 1) * COUNT))
    assert len({tuple(number % COUNT for number in found) for found in passes}) == 4
    assert taken(order(seed=4), 0, range(COUNT)) != passes[0]


@pytest.mark.parametrize("documents", [BOOKS, "stream"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("streams", [1, 5, 40])
def test_streams_share_the_documents_out(documents, shuffle, streams):
    documents = Stream(BOOKS) if documents == "stream" else documents
    dealt = order(documents, shuffle=shuffle, streams=streams)
    each = 3 * COUNT // streams + 1
    by_place = [dealt.take(stream, place) for place in range(each) for stream in range(streams)]
    for number, index, document in by_place:
        assert number % COUNT == index
        assert document is BOOKS[index]
    numbers = [number for number, _, _ in by_place]
    for epoch in range(3):
        found = numbers[epoch * COUNT : (epoch + 1) * COUNT]
        assert sorted(found) == list(range(epoch * COUNT, (epoch + 1) * COUNT))
        assert (found == sorted(found)) == (not shuffle)


def test_a_streamed_set_is_the_same_for_every_layout():
    together = order(Stream(BOOKS), streams=6)
    expected = {stream: taken(together, stream, range(12)) for stream in range(6)}
    for numbers in ([0, 1], [5], [3, 2]):
        alone = order(Stream(BOOKS), streams=6)
        for place in range(12):
            for stream in numbers:
                assert alone.take(stream, place)[0] == expected[stream][place]


def test_a_streamed_set_is_read_once_per_pass_and_let_go():
    stream = Stream(BOOKS)
    dealt = order(stream, streams=2)
    for place in range(11):
        for number in (0, 1):
            dealt.take(number, place)
        dealt.forget({0: place + 1, 1: place})
        assert len(dealt._blocks._kept) <= 2
    assert stream.read == COUNT - 1 + 1  # the last block of 3 tells that the end is there
    assert stream.count == COUNT


def test_a_streamed_set_goes_on_from_any_place():
    expected = taken(order(Stream(BOOKS), streams=2), 1, range(40))
    for place in (0, 5, 11, 12, 30):
        stream = Stream(BOOKS)
        stream.count = COUNT if place > 11 else None  # what a saved position knows
        assert taken(order(stream, streams=2), 1, range(place, 40)) == expected[place:]


def test_a_stream_number_beyond_the_end_of_a_streamed_set():
    # 50 streams, 23 documents: this process's first document is in the third pass, and it never read the first.
    assert order(Stream(BOOKS), streams=50, shuffle=False).take(48, 0)[1] == 48 % COUNT


def test_a_streamed_set_must_be_dealt_out():
    with pytest.raises(ConfigError, match="streams must be given for a streamed dataset"):
        order(Stream(BOOKS))


TABLES = [{"at_least": 100, "share": 1}, {"at_least": 10, "below": 50, "share": 3}]


def test_tables_become_bins_by_length():
    bins = as_buckets(TABLES)
    assert bins == (Bucket(at_least=10, below=50, share=3), Bucket(at_least=100, share=1))
    assert as_buckets(bins) == bins
    lengths = (9, 10, 49, 50, 99, 100, 10**6)
    assert [[length for length in lengths if item.holds(length)] for item in bins] == [[10, 49], [100, 10**6]]


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
