"""One decoder for all tests of the engine, and engines of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mplus
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.serving.config import ServeConfig
from mplus.serving.engine.client import InProcessEngine
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.messages import Generate, MemoryName, NewToken, Sampling, WriteMemory

ADA = MemoryName("tests", "ada")
SIZES: dict[str, Any] = {
    "chunk_tokens": 32,
    "memory_tokens_per_chunk": 8,
    "short_term_tokens": 24,
    "retrieved_tokens": 12,
    "long_term_tokens": 1000,
    "retriever": {"name": "linear", "width": 16},
}
STORY = "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her red ball."


@pytest.fixture(scope="session")
def decoder() -> ServedDecoder:
    """stories260K, wrapped for M+ with small sizes."""
    torch.manual_seed(0)
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(**SIZES))
    return ServedDecoder.of(model, load_tokenizer(), "stories260K")


Serve = Callable[..., InProcessEngine]


@pytest.fixture
def serve(decoder: ServedDecoder, tmp_path: Path) -> Iterator[Serve]:
    """Starts engines on one folder, and closes them."""
    clients: list[InProcessEngine] = []

    def start(**changes: Any) -> InProcessEngine:
        clients.append(InProcessEngine(decoder, ServeConfig(memories=tmp_path / "memories", **changes)))
        return clients[-1]

    yield start
    for client in clients:
        client.engine.close(0)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, which must not take forever."""
    return asyncio.run(asyncio.wait_for(work, 120))


def ask(decoder: ServedDecoder, memory: MemoryName | None, text: str, tokens: int = 8, **changes: Any) -> Generate:
    """A greedy request of so many tokens, whatever they are."""
    ids = decoder.tokenizer(text)["input_ids"]
    sampling = Sampling(**{"max_tokens": tokens, "temperature": 0.0, "ignore_end": True, **changes.pop("sampling", {})})
    return Generate("tests" if memory is None else memory.tenant, memory, ids, sampling=sampling, **changes)


async def tokens_of(client: InProcessEngine, request: Generate, row: int = 0) -> list[int]:
    """The tokens of one row of an answer."""
    events = [event async for some in client.generate(request) for event in some]
    return [event.id for event in events if isinstance(event, NewToken) and event.row == row]


async def tell(client: InProcessEngine, memory: MemoryName, text: str, source: str | None = "told", **more: Any) -> Any:
    """Write a text to a memory."""
    return await client.call(WriteMemory(memory, text, source, **more))
