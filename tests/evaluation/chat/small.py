"""The smallest chat model: stories260K with a chat template, which says nothing sensible but reads as others do."""

from __future__ import annotations

import functools

import torch

import mplus
from mplus.evaluation.chat.prompt import ChatPrompt
from mplus.evaluation.execution import GeneratedAnswers
from mplus.evaluation.generating import Generation
from mplus.evaluation.options import RunOptions
from mplus.evaluation.tasks import protocol
from mplus.evaluation.texts import Texts
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
KV = {"mechanism": "kv", "chunk_tokens": 64, "retrieved_tokens": 96}


@functools.cache
def tokenizer():
    found = load_tokenizer()
    found.chat_template = TEMPLATE
    return found


@functools.cache
def decoder():
    """Never wrapped."""
    return load_decoder()


@functools.cache
def wrapped():
    return mplus.wrap(load_decoder(), mplus.MPlusConfig.from_dict(KV), check=False)


def notes(**options):
    cls = protocol("notes")
    return cls(cls.Options(**{"notes": 5, "facts": 2, "questions": 3, **options}), Texts(tokenizer()))


def execution(model=None, task=None, tokens=4, **options):
    return GeneratedAnswers(
        model or wrapped(),
        tokenizer(),
        task or notes(),
        options=RunOptions(**{"streams": 1, **options}),
        generation=Generation.of(tokenizer(), tokens=tokens),
        chat=ChatPrompt.of(tokenizer()),
    )


def greedy(model, ids, tokens=4):
    """The ids that a plain loop generates behind a prompt, one forward of the whole text for each."""
    made = list(ids)
    with torch.no_grad():
        for _ in range(tokens):
            made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    found = made[len(ids) :]
    return tuple(found[: found.index(2)] if 2 in found else found)
