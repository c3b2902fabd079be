"""Text of tokens as they come: equal to decoding all at once, in pieces that never change, without stop strings."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mplus.hf.pretrained.shipped import STORIES260K
from mplus.serving.http.text import LONGEST_CHARACTER, IncrementalText, StopStrings
from mplus.serving.http.tokenizer import Tokenizer

TEXTS = st.text(alphabet=st.sampled_from("ab  zoéß€語🙂👩‍👩‍👧\n.'"), max_size=40)


@pytest.fixture(scope="module")
def byte_fallback():
    """Words, and bytes in the place of rare characters."""
    return Tokenizer(str(STORIES260K), 512, 512)


@pytest.fixture(scope="module")
def byte_level(byte_fallback):
    """Every token is a byte, as in the vocabularies of GPT-2 and SmolLM2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = Tokenizer(str(STORIES260K), 512, 512)
    found.model = PreTrainedTokenizerFast(tokenizer_object=backend)
    return found


def pieces(text: IncrementalText, tokens: list[int]) -> list[str]:
    return [*map(text.add, tokens), text.end()]


@pytest.mark.parametrize("kind", ["byte_fallback", "byte_level"])
@given(words=TEXTS)
def test_the_pieces_make_up_the_text(request, kind, words):
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer.model(words, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer.text(), tokens)
    assert "".join(found) == tokenizer.decode(tokens)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@given(tokens=st.lists(st.integers(0, 511), max_size=60))
def test_any_tokens_make_some_text(byte_fallback, tokens):
    found = pieces(byte_fallback.text(), tokens)
    kept = [token for token in tokens if token not in byte_fallback.special]
    without_bytes = not any(3 <= token < 259 for token in kept)
    assert not without_bytes or "".join(found) == byte_fallback.decode(kept)


def test_special_tokens_are_no_text_and_do_not_eat_a_space(byte_fallback):
    once = byte_fallback.model("Once upon", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(byte_fallback.text(), [1, once[0], 2, *once[1:], 2])) == "Once upon"


def test_a_token_is_decoded_in_a_window_and_not_with_the_whole_answer(byte_fallback):
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_fallback.decode(ids)

    draw = random.Random(0)
    words = [draw.randrange(259, 512) for _ in range(300)]
    unfinished = [3 + 0xE2] * 300  # the first byte of a character, again and again
    for tokens in (words, unfinished, words + unfinished):
        pieces(IncrementalText(decode), tokens)
    assert longest <= 2 * LONGEST_CHARACTER


def test_a_broken_character_does_not_change_those_before_it(byte_fallback):
    """Some decoders show every byte of a run as broken where one of them is."""
    smile, broken = [3 + byte for byte in "🙂".encode()], 3 + 0xFF
    letter = byte_fallback.model.convert_tokens_to_ids("a")
    assert byte_fallback.decode([*smile, broken, letter]).startswith("\N{REPLACEMENT CHARACTER}")
    said = "".join(pieces(byte_fallback.text(), [*smile, broken, letter]))
    assert said == "🙂\N{REPLACEMENT CHARACTER}a"


def test_bytes_that_are_no_character_do_not_hold_the_text_back(byte_fallback):
    text = byte_fallback.text()
    assert "".join(text.add(3 + 0xFF) for _ in range(50))


def plainly(text: str, stops: list[str]) -> str:
    """What is before the stop string that ends first, read character by character."""
    for end in range(len(text) + 1):
        if found := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(found)]
    return text


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_strings_across_pieces(text, stops, cuts):
    finder, said = StopStrings(stops), ""
    edges = [0, *sorted(cuts), len(text)]
    for begin, end in pairwise(edges):
        said += finder.add(text[begin:end])
        assert plainly(text, stops).startswith(said), "what was said is never taken back"
    said += finder.end()
    assert said == plainly(text, stops)
    assert finder.stopped == (said != text)


def test_the_pieces_do_not_decide_which_of_two_stop_strings_ends_a_text():
    assert StopStrings(["b", "aba"]).add("aba") == "a"
    finder = StopStrings(["b", "aba"])
    assert finder.add("ab") + finder.add("a") == "a"


def test_only_the_beginning_of_a_stop_string_is_held_back():
    finder = StopStrings(["\nUser:"])
    assert [finder.add(piece) for piece in ("Hello", "\n", "Us", "ual", "\nUser", ":", "x")] == [
        "Hello", "", "", "\nUsual", "", "", "",
    ]  # fmt: skip


def test_bytes_of_tokens(byte_fallback, byte_level):
    for tokenizer in (byte_fallback, byte_level):
        for text in ("dog", "é", "🙂"):
            tokens = tokenizer.model(text, add_special_tokens=False)["input_ids"]
            assert b"".join(map(tokenizer.token_bytes, tokens)).decode().strip() == text
