"""Texts are cut behind sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from mplus.hf.pretrained.shipped import load_tokenizer
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
