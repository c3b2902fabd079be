"""Decoders that chat in the tests: the one that comes with mplus, with a chat template, and a memory of text."""

from __future__ import annotations

import pytest

import mplus
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    found = load_tokenizer()
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="session")
def model():
    """Puts the best passage in front of the prompt."""
    return mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism={"name": "notes", "passages": 1}))


@pytest.fixture
def memory(model, tokenizer):
    return model.new_memory(tokenizer=tokenizer)


@pytest.fixture
def chat(model, memory):
    return new_chat(model, memory)


def new_chat(model, memory, **options):
    return mplus.Chat(model, memory, **{"window_tokens": 120, "max_new_tokens": 6, "do_sample": False, **options})


def kept(memory):
    """Name and text of everything in memory, in order."""
    return [(entry.source, entry.fields[0]) for entry in memory.states[0].entries()]
