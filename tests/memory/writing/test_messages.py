"""Chat messages as ``Memory.write`` takes them: a text for each turn, with its speaker in front."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from mplus.errors import InputError
from mplus.memory.writing.messages import turns
from tests.memory import tiny
from tests.memory.writing.test_write import tokenizer

pytestmark = pytest.mark.two_computations

WORDS = tokenizer()


def says(role: str, *words: int, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": " ".join(f"w{word}" for word in words), **more}


CHAT = [says("w11", *range(20, 38)), says("w12", *range(40, 47)), says("w11", *range(50, 60))]


def written(data: Any, rows: int = 1, **options: Any) -> Any:
    memory = tiny.variant("paper").new_memory(batch_size=rows, tokenizer=WORDS, keep_text=True, **options)
    memory.write(data)
    return memory


def chunks(memory: Any, row: int = 0) -> list[list[int]]:
    return [text.ids.tolist() for text in memory.states[row].texts.chunks()]


def flat(parts: list[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


def test_every_turn_is_a_text_of_its_own() -> None:
    memory, by_hand = written(CHAT), written(turns(CHAT)[0])
    for text in turns(CHAT)[1:]:
        by_hand.write(text)
    tiny.assert_same(memory, by_hand)
    assert [len(chunk) for chunk in chunks(memory)] == [10, 9, 8, 11], "the speaker's is the first token of a turn"
    assert [len(chunk) for chunk in chunks(written(" ".join(turns(CHAT))))] == [16, 16, 6], "as one text it would span"


def test_a_conversation_for_each_row() -> None:
    memory = written([CHAT, None, CHAT[:1]], rows=3)
    assert [len(chunk) for chunk in chunks(memory)] == [10, 9, 8, 11]
    assert chunks(memory, 1) == []
    assert chunks(memory, 2) == chunks(memory)[:2]
    with pytest.raises(InputError, match=r"one text per batch row \(2\), got 1"):
        written(CHAT, rows=2)


def test_what_a_chat_template_returns() -> None:
    ids, more = tiny.ids(20).tolist(), tiny.ids(12, 1).tolist()
    padded = {"input_ids": [ids, [0] * 8 + more], "attention_mask": [[1] * 20, [0] * 8 + [1] * 12]}
    for encoded in (padded, BatchEncoding(padded), BatchEncoding(padded, tensor_type="pt"), {"input_ids": [ids, more]}):
        memory = written(encoded, rows=2)
        assert [flat(chunks(memory, row)) for row in (0, 1)] == [ids, more]
    one = written(ids)
    for encoded in ({"input_ids": ids}, BatchEncoding({"input_ids": torch.tensor([ids])}), torch.tensor([ids]).numpy()):
        tiny.assert_same(written(encoded), one)
    assert flat(chunks(written([BatchEncoding({"input_ids": more}), CHAT], rows=2))) == more


def test_words_come_from_texts_and_text_parts_alone() -> None:
    parts = [{"type": "text", "text": "I like "}, {"text": "tea"}, "."]
    empty = {"role": "assistant", "content": " \n", "tool_calls": None}
    assert turns([{"role": "user", "name": "Ada", "content": parts}, empty, {"role": "tool", "content": "4"}]) == [
        "Ada: I like tea.\n",
        "tool: 4\n",
    ]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "hello"}, r"messages\[1\] must have a role, .*got None"),
        ({"role": "", "content": "hello"}, r"messages\[1\] must have a role, .*got ''"),
        ({"role": "user", "name": 7, "content": "hello"}, r"messages\[1\] must have a name, .*got 7"),
        ({"role": "user"}, r"messages\[1\] must have a content, .*got None"),
        ({"role": "user", "content": 3}, r"messages\[1\] must have a content, .*got 3"),
        ({"role": "user", "content": "", "tool_calls": [{}]}, r"messages\[1\] must have words alone, got tool_calls"),
        ({"role": "user", "content": "a", "contents": "b"}, r"messages\[1\] must have role .*, got 'contents'"),
        (
            {"role": "user", "content": [{"type": "image"}]},
            r"messages\[1\]\['content'\]\[0\] .*got one of type 'image'",
        ),
        ("hello", r"messages\[1\] must be a message with role and content, got str"),
    ],
)
def test_what_is_wrong_is_named(message: Any, said: str) -> None:
    memory = tiny.variant("paper").new_memory(tokenizer=WORDS)
    with pytest.raises(InputError, match=said):
        memory.write([CHAT[0], message])
    assert memory.version == 0, "nothing was written, not even the first turn"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([{"role": "user", "content": ""}], "nothing to write"),
        ({"role": "user", "content": "hello"}, "put chat messages into a list"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, r"as many numbers as input_ids in each row, \[3\], got"),
    ],
)
def test_what_is_no_conversation_says_so(data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        written(data)
    with pytest.raises(InputError, match="needs a tokenizer"):
        tiny.variant("paper").new_memory().write(CHAT)
