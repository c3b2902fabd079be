"""The server's tokenizer on SmolLM2: prompts by its chat template, and text in pieces."""

from __future__ import annotations

import asyncio

import pytest

from mplus.serving.http.tokenizer import Tokenizer

WORDS = "Zoë pays €5 — 谢谢 👩‍👩‍👧 naïve\n\n\tdef f(x):  return x\n"


@pytest.fixture(scope="module")
def served(folder):
    return Tokenizer(str(folder), 8192, 49152)


def test_a_prompt_is_that_of_the_chat_template(served, tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": WORDS}]
    ids = asyncio.run(served.chat(messages))
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == asked
    assert served.has_template


def test_the_pieces_make_up_the_text(served, tokenizer):
    ids = tokenizer(WORDS)["input_ids"]
    text = served.text()
    pieces = [*map(text.add, [*ids, tokenizer.eos_token_id]), text.end()]
    assert "".join(pieces) == WORDS == b"".join(map(served.token_bytes, ids)).decode()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
