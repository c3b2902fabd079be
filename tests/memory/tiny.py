"""Tiny wrapped decoders, equal in every process, and bit-for-bit comparison of memories."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME, VOCAB_SIZE
from mplus.hf.reading.override import reading_as
from mplus.testing.rounding import InFloat64, allowed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mplus.memory import Memory

K, N, K0, CAPACITY, CHUNK = 4, 12, 6, 40, 16
SIZES: dict[str, Any] = {
    "chunk_tokens": CHUNK,
    "min_chunk_tokens": 4,
    "memory_tokens_per_chunk": K,
    "short_term_tokens": N,
    "retrieved_tokens": K0,
    "long_term_tokens": CAPACITY,
    "retriever": {"name": "linear", "width": 8},
    "adapters": {"rank": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "published": {
        "variant": "published",
        "mechanism": {"name": "mplus", "merge_every": 3, "lifetime": 4.0},
        "long_term_tokens": None,
    },
    "memoryllm": {"mechanism": "memoryllm"},
    "memoryllm-published": {"mechanism": "memoryllm", "variant": "published"},
}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A wrapped Llama of three layers; begin rows, mark, retriever and both adapters are random and matter."""
    model = BY_NAME["llama"].build(seed).to(dtype)
    mplus.wrap(model, mplus.MPlusConfig.from_dict({**SIZES, **changes}), check=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("mplus.") or ".lora_" in name:
                scale = 1.0 if parameter.dim() > 2 else parameter.shape[-1] ** -0.5
                if ".lora_B." in name:  # the update is scaled by alpha / rank = 16
                    scale /= 16
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def variant(name: str) -> Any:
    """The decoder of a variant, shared between tests: whoever changes one builds it anew."""
    return build(**VARIANTS[name])


def ids(tokens: int, seed: int = 0) -> Tensor:
    """``[tokens]`` random ids."""
    return torch.randint(2, VOCAB_SIZE, (tokens,), generator=torch.Generator().manual_seed(seed))


def prompts(rows: int, tokens: int = 7, seed: int = 1000) -> Tensor:
    """``[rows, tokens]`` random ids."""
    return torch.stack([ids(tokens, seed + row) for row in range(rows)])


@functools.cache
@torch.no_grad()
def rounding(name: str = "paper") -> float:
    """How far logits and rows of memory may be apart that are computed in two ways, as in batches of two sizes.

    Several times what is measured in float32 against the same decoder in float64: rows of a memory that was written to
    for as long as one of the tests is, each chunk after the rows of the one before, and a text that is read with it.
    """
    found: list[list[Tensor]] = []
    for model, mode in ((variant(name), nullcontext()), (copy.deepcopy(variant(name)).double(), InFloat64())):
        memory = model.new_memory(seed=3)
        with mode:
            for turn in range(6):
                memory.write(ids(3 * CHUNK, 900 + turn))
            # Scores of rows are float32 whatever the decoder is in.
            without = nullcontext() if model.mplus.retriever is None else reading_as(model, retrieved_tokens=0)
            with without:
                logits = model(prompts(1), memory=memory).logits
        held = content(memory)
        found.append([logits, *(held[key] for key in sorted(held) if key.endswith(("hidden", "key")))])
    return max(allowed(plain, exact) for plain, exact in zip(*found, strict=True))


def content(memory: Memory) -> dict[str, Any]:
    """All a memory holds but the ids of its long-term rows, by name."""
    found: dict[str, Any] = {}
    streams = memory.streams
    for i, (state, store, generator) in enumerate(zip(streams.states, streams.stores, streams.generators, strict=True)):
        found[f"{i}.clock"], found[f"{i}.sources"] = state.clock, state.sources
        found[f"{i}.generator"], found[f"{i}.writes"] = generator.get_state(), state.writes
        for name, counter in state.counters.items():
            found[f"{i}.counter.{name}"] = counter
        for layer in range(store.layout.layers):
            tiers = {
                "stm": state.stm[layer],
                "pending": state.pending[layer],
                "ltm": store.gather(layer, store.ids(layer)),
            }
            for tier, rows in tiers.items():
                for name, column in rows.columns().items():
                    found[f"{i}.{tier}.{layer}.{name}"] = column
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names under which two contents differ in any bit."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if not _equal(one.get(name), other.get(name))]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)
    return type(one) is type(other) and bool(one == other)


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def assert_same(one: Memory, other: Memory) -> None:
    """Two memories are equal bit for bit, and will draw the same."""
    assert difference(content(one), content(other)) == []


def assert_content(memory: Memory, expected: dict[str, Any]) -> None:
    """A memory holds exactly what ``content`` gave before."""
    assert difference(content(memory), expected) == []


def written(name: str, lengths: Sequence[int], seed: int = 0) -> Memory:
    """A memory of a variant with one stream for each length: two sources each, the second one shorter."""
    memory = variant(name).new_memory(batch_size=len(lengths), seed=seed)
    for part, source in enumerate(("first", "zweite Quelle")):
        rows = [ids(length // (part + 1), seed + 10 * part + row) for row, length in enumerate(lengths)]
        memory.write(rows, source=source)
    return memory


def rows_bytes(memory: Memory) -> int:
    """Bytes of the rows that a memory holds, which a budget limits, without what stores reserve for more."""
    stored = sum(store.count(at) * store.bytes_per_row for store in memory.stores for at in range(store.layout.layers))
    return sum(state.nbytes for state in memory.states) + stored
