"""How a text is cut into passages."""

from __future__ import annotations

import pytest

from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.memory.writing.passages import PassageCutter, cut, with_ids

TOKENIZER = load_tokenizer()
TEXT = (
    'Once upon a time there was a dragon. "Who are you?" asked the boy. He had 3.5 cakes!  They ate.\n\n'
    "A new day. "
    + "The dragon flew over the sea and the hills and the town and the wood and the lake "
    * 3
    + "far away.\n"
    "donaudampfschifffahrtsgesellschaft" * 6 + " is a word. The end."
)


def tokens(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("most", [1, 7, 20, 60, 1000])
def test_together_they_are_the_text_and_none_is_too_long(most: int) -> None:
    passages = cut(TEXT, TOKENIZER, most)
    assert "".join(passages) == TEXT
    assert all(tokens(passage) <= most for passage in passages) or most == 1  # a letter may have more than one


def test_whole_sentences_fill_a_passage() -> None:
    assert cut("The cat sat. The dog ran. The boy ate it.", TOKENIZER, 16) == [
        "The cat sat. The dog ran. ",
        "The boy ate it.",
    ]
    assert cut("He had 3.5 cakes. So.", TOKENIZER, 100) == ["He had 3.5 cakes. So."]


def test_a_sentence_that_is_too_long_is_cut_between_words() -> None:
    passages = cut("Yes. the cat and the dog and the boy", TOKENIZER, 8)
    assert passages[0] == "Yes. "
    assert all(passage.endswith(" ") for passage in passages[:-1])


@pytest.mark.parametrize("most", [7, 20, 60])
@pytest.mark.parametrize("step", [1, 13, 400])
def test_bit_by_bit_it_is_cut_as_at_once(most: int, step: int) -> None:
    cutter, found = PassageCutter(TOKENIZER, most), []
    for first in range(0, len(TEXT), step):
        found += cutter.add(TEXT[first : first + step])
    assert [*found, *cutter.rest()] == cut(TEXT, TOKENIZER, most)


def test_white_space_alone_is_left_out() -> None:
    assert [text for text, _ in with_ids(["a ", " \n", "b"], TOKENIZER)] == ["a ", "b"]
