"""Tokens become pieces of text as soon as they are sure, and a stop is never told."""

from __future__ import annotations

import pytest
import torch

from mplus.chat.streaming import Watch


class Bytes:
    """A tokenizer of one token per byte."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", "replace")


def watched(text, stops=()):
    said = []
    watch = Watch(Bytes(), stops, said.append)
    watch.put(torch.zeros(1, 5, dtype=torch.int64))
    ended = None
    for place, byte in enumerate(text.encode()):
        watch.put(torch.tensor([byte]))
        if bool(watch(torch.zeros(1, 1), torch.zeros(1, 1))) and ended is None:
            ended = place
    watch.end()
    return said, watch, ended


def test_characters_of_several_tokens_come_whole():
    said, watch, _ = watched("aé\N{GRINNING FACE}b")
    assert said == ["a", "é", "\N{GRINNING FACE}", "b"]
    assert watch.tokens == list("aé\N{GRINNING FACE}b".encode())


@pytest.mark.parametrize(
    ("text", "expected", "ends"),
    [
        ("Yes.\nUser: and", "Yes.", 9),
        ("Yes.\nUseful", "Yes.\nUseful", None),
        ("Yes.\n", "Yes.\n", None),
        ("\nUser:", "", 5),
    ],
)
def test_a_stop_ends_the_answer_and_is_not_told(text, expected, ends):
    said, _, ended = watched(text, ["\nUser:"])
    assert "".join(said) == expected
    assert ended == ends
