"""Texts are cut behind sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import InputError, MechanismError
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.mechanisms.kv.chunks import cut_at_sentences

if TYPE_CHECKING:
    from collections.abc import Sequence


def cut(pieces: list[str], most: int) -> list[str]:
    """Cut a text whose tokens are ``pieces``."""

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[number] for number in ids)

    return [decode(chunk.tolist()) for chunk in cut_at_sentences(torch.arange(len(pieces)), most, decode)]


@pytest.mark.parametrize(
    ("text", "most", "wanted"),
    [
        ("It rained . We stayed in . Then it cleared .", 7, ["It rained . We stayed in .", " Then it cleared ."]),
        ("It rained . We stayed in . Then it cleared .", 99, ["It rained . We stayed in . Then it cleared ."]),
        ("one two three four five", 2, ["one two", " three four", " five"]),
        ("a . b c d e f g", 4, ["a .", " b c d e", " f g"]),
    ],
)
def test_whole_sentences_fill_a_chunk(text: str, most: int, wanted: list[str]) -> None:
    first, *rest = text.split(" ")
    assert cut([first, *(f" {word}" for word in rest)], most) == wanted


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (["He", " said", ' "', "no", ".", '"', " And", " went"], ['He said "no."', " And went"]),
        (["line", "\n", "next", " line", " ends", " here", " now"], ["line\n", "next line ends here now"]),
        (["Yes", ".", "\n", "a", " b", "\n", "c", " d"], ["Yes.\n", "a b\nc d"]),  # a sentence comes before a line
        (["a", "\n", "\n", "b", "\n", "c", " d"], ["a\n\n", "b\nc d"]),  # and so does a paragraph
        (["Hi", ".", " Ask", " Mr", ".", " Lee", " now"], ["Hi.", " Ask Mr. Lee now"]),
        (["Hi", ".", " By", " J", ".", " Doe", " now"], ["Hi.", " By J. Doe now"]),
        (["天", "气", "。", "好", "的", "吗", "你"], ["天气。", "好的吗你"]),
        (["3", ".", "1", "4", "1", "5", "9", "2"], ["3.1415", "92"]),  # no end of a sentence, nor of a word
        (["un", "believ", "able", " thing", "s", " hap", "pen", "ing"], ["unbelievable things", " happening"]),
    ],
)
def test_a_cut_is_behind_quotes_lines_and_words(pieces: list[str], wanted: list[str]) -> None:
    assert cut(pieces, 6) == wanted


def test_chunks_are_the_text_and_keep_to_their_size() -> None:
    tokenizer = load_tokenizer()
    text = "Once upon a time there was a dog. It ran! Where did it go? Nobody knows...\nThe end, he said. " * 3
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    for most in (1, 5, 16, 64, 10**6):
        chunks = cut_at_sentences(ids, most, tokenizer.decode)
        assert torch.equal(torch.cat(chunks), ids)
        assert 1 <= min(map(len, chunks)) <= max(map(len, chunks)) <= most


def test_a_chunk_is_the_same_whatever_comes_behind_it() -> None:
    tokenizer = load_tokenizer()
    text = 'He said "no." And then (at last.) he went. "Where?" she asked... Nobody knew\nwhat to say. ' * 4
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    for most in (6, 9, 17):
        begin = 0
        for chunk in cut_at_sentences(ids, most, tokenizer.decode)[:-1]:
            alone = cut_at_sentences(ids[begin : begin + most + 1], most, tokenizer.decode)
            assert torch.equal(alone[0], chunk)
            begin += len(chunk)


@pytest.fixture(scope="module")
def model() -> Any:
    return mplus.wrap(load_decoder(), {"mechanism": "kv", "chunk_tokens": 24})


class TestMemory:
    """A memory of keys and values cuts what is written to it by its tokenizer."""

    TEXT = "The cat sat down. It was warm there, and the cat slept. Then a dog came by! " * 3

    def lengths(self, memory: mplus.Memory) -> list[int]:
        state: Any = memory.states[0]
        return state.chunk_length.tolist()  # type: ignore[no-any-return]

    def test_chunks_end_with_sentences(self, model: Any) -> None:
        tokenizer = load_tokenizer()
        memory = model.new_memory(tokenizer=tokenizer)
        memory.write(self.TEXT)
        state: Any = memory.states[0]
        pieces = [tokenizer.decode(part).strip() for part in state.token_ids.split(self.lengths(memory))]
        assert len(pieces) > 3
        assert all(piece.endswith((".", "!")) for piece in pieces)

    def test_pieces_are_cut_as_the_whole_is(self, model: Any) -> None:
        tokenizer = load_tokenizer()
        ids = torch.tensor(tokenizer(self.TEXT, add_special_tokens=False)["input_ids"])
        whole = model.new_memory(tokenizer=tokenizer)
        whole.write(ids)
        for size in (1, 7, 60):
            memory = model.new_memory(tokenizer=tokenizer)
            memory.write_pieces(ids.split(size))
            assert self.lengths(memory) == self.lengths(whole)
        with pytest.raises(InputError, match="there is nothing to write"):
            model.new_memory(tokenizer=tokenizer).write_pieces([])

    def test_the_end_of_a_write_or_a_turn_ends_a_chunk(self, model: Any) -> None:
        memory = model.new_memory(tokenizer=load_tokenizer())
        memory.write("A", source="a")
        memory.write("Yes.", source="a")
        turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
        memory.write(turns, source="b")
        state: Any = memory.states[0]
        assert len(self.lengths(memory)) == 4
        assert state.chunk_source.tolist() == [0, 0, 1, 1]
        without = model.new_memory()
        without.write(torch.arange(5, 60))
        assert self.lengths(without) == [24, 24, 7]


def test_other_cuts_than_chunks_are_refused() -> None:
    model = mplus.wrap(load_decoder(), {"mechanism": "kv", "chunk_tokens": 24})
    model.mplus_engine.mechanism.chunks = lambda ids, tokenizer: [ids[:1]]
    with pytest.raises(MechanismError, match="'kv': chunks must cut 4 tokens into pieces of 1 to chunk_tokens"):
        model.new_memory().write([5, 6, 7, 8])


def test_a_read_attends_to_as_many_tokens_as_the_longest_chunks_have() -> None:
    model = mplus.wrap(load_decoder(), {"mechanism": {"name": "kv", "retrieved_chunks": 2}, "chunk_tokens": 24})
    memory = model.new_memory()
    for tokens in (3, 9, 5):
        memory.write(torch.arange(5, 5 + tokens))
    assert model.mplus_engine.mechanism.attended_rows(memory.snapshot()[0]) == 14
