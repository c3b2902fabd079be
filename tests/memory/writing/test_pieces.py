"""A document that comes in pieces is written as the whole would be."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import InputError
from mplus.memory.writing.chunking import cut_up
from mplus.memory.writing.pieces import Cutter
from tests.memory import tiny
from tests.memory.writing.test_write import tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator


@given(
    sizes=st.lists(st.integers(0, 60), max_size=8),
    chunk=st.integers(1, 20),
    data=st.data(),
)
def test_pieces_are_cut_as_the_whole_is(sizes: list[int], chunk: int, data: st.DataObject) -> None:
    shortest = data.draw(st.integers(1, chunk))
    ids, cutter, found = torch.arange(sum(sizes)), Cutter(chunk, shortest), []
    for piece in ids.split(sizes):
        found += cutter.cut(piece)
        assert len(cutter.held) <= chunk * (shortest + 1)
    (last, rest), (chunks, left) = cutter.rest(), cut_up(ids, chunk, shortest)
    assert [part.tolist() for part in (*found, *last, rest)] == [part.tolist() for part in (*chunks, left)]


def test_a_document_in_pieces_leaves_the_memory_that_the_whole_leaves() -> None:
    words = [f"w{number % tiny.VOCAB_SIZE}" for number in range(7, 107)]
    model = tiny.variant("paper")
    whole, pieces, ids = (model.new_memory(tokenizer=tokenizer(), seed=3) for _ in range(3))
    expected = whole.write(" ".join(words), source="book")
    lines = (" ".join(words[place : place + 9]) for place in range(0, 100, 9))
    report = pieces.write_pieces((line for text in lines for line in (text, "")), source="book")
    assert (report.tokens, report.chunks, report.dropped_rows) == (
        expected.tokens,
        expected.chunks,
        expected.dropped_rows,
    )
    ids.write_pieces(iter([[int(word[1:]) for word in words[:50]], torch.tensor([int(w[1:]) for w in words[50:]])]))
    tiny.assert_same(whole, pieces)
    assert [len(rows) for rows in ids.states[0].stm] == [len(rows) for rows in whole.states[0].stm]


def test_pieces_are_fetched_one_ahead_and_in_another_thread() -> None:
    memory = tiny.variant("paper").new_memory()
    fetched, threads = [], set()

    def pieces() -> Iterator[list[int]]:
        for number in range(6):
            # The piece before the last one fetched is written meanwhile; those before it are.
            assert sum(source.tokens for source in memory.states[0].sources) >= tiny.CHUNK * (number - 3)
            fetched.append(number)
            threads.add(threading.get_ident())
            yield [number] * tiny.CHUNK

    memory.write_pieces(pieces())
    assert fetched == list(range(6))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_what_was_written_before_an_error_stays() -> None:
    memory = tiny.variant("paper").new_memory()

    def broken() -> Iterator[list[int]]:
        yield [1] * 5 * tiny.CHUNK
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        memory.write_pieces(broken(), source="book")
    (source,) = memory.sources()
    assert source.tokens == 3 * tiny.CHUNK  # the rest might have had to share with what never came
    with pytest.raises(InputError, match="ids must lie in the vocabulary"):
        memory.write_pieces([[tiny.VOCAB_SIZE] * 40])
    with pytest.raises(InputError, match="nothing to write"):
        memory.write_pieces([])


def test_what_are_no_pieces_is_refused() -> None:
    memory = tiny.variant("paper").new_memory()
    for wrong in ("a text", b"bytes", torch.arange(20), 7):
        with pytest.raises(InputError, match="pieces must be an iterable of texts or ids, got"):
            memory.write_pieces(wrong)
    with pytest.raises(InputError, match="writing text needs a tokenizer"):
        memory.write_pieces(["a text"])
    with pytest.raises(InputError, match="write_pieces writes to one stream, and this memory has 2"):
        tiny.variant("paper").new_memory(batch_size=2).write_pieces([[1] * 20])
