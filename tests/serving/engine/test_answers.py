"""Answers of many users at once: each as if it were alone, and none waits for what is another's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.messages import Began, Ended, MakeMemory, MemoryName
from tests.serving.engine.conftest import ADA, STORY, Serve, ask, run, tell, tokens_of


def test_thirty_two_users_are_answered_as_each_alone(decoder: ServedDecoder, serve: Serve, tmp_path: Path) -> None:
    names = [MemoryName(f"tenant {n % 3}", f"user{n}") for n in range(32)]
    texts = [" ".join([STORY] * (n % 4)) + f" Her number was {n}." for n in range(32)]
    beginnings = ("The dog", "Tom and Sue were", "A big red", "One day,", "Mom said", "The sun", "In the box")
    prompts = [f"{beginnings[n % 7]}{' and the cat' * (n % 3)}" for n in range(32)]

    async def together() -> list[list[int]]:
        client = serve(max_batch=16)
        await asyncio.gather(*(client.call(MakeMemory(name)) for name in names))
        await asyncio.gather(*(tell(client, name, text) for name, text in zip(names, texts, strict=True)))
        requests = [ask(decoder, name, prompt, 12) for name, prompt in zip(names, prompts, strict=True)]
        return list(await asyncio.gather(*(tokens_of(client, request) for request in requests)))

    answers = run(together())
    for n, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if n % 4 and n > 8:  # each kind was looked at
            continue
        memory = decoder.model.new_memory(tokenizer=decoder.tokenizer)
        memory.write(text, source="told")
        ids = decoder.tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = decoder.model.generate(
            ids, attention_mask=torch.ones_like(ids), memory=memory, max_new_tokens=12, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answers[n] == alone[0, ids.shape[1] :].tolist(), n
    assert len({tuple(answer) for answer in answers}) > 12


def test_events_come_in_order(decoder: ServedDecoder, serve: Serve) -> None:
    async def events() -> list[Any]:
        client = serve()
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY)
        return [event async for some in client.generate(ask(decoder, ADA, "Lily", 3, answers=2)) for event in some]

    found = run(events())
    assert isinstance(found[0], Began)
    assert found[0].memory_version > 0
    assert sum(isinstance(event, Ended) for event in found) == 2
    assert [event.reason for event in found if isinstance(event, Ended)] == ["length", "length"]
    assert len(found) == 1 + 2 * 3 + 2
