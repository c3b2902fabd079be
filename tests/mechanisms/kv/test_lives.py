"""Whatever a memory went through, and wherever its rows lie, a read is the decoder reading the right text in front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from tests.mechanisms.kv.memories import CHUNK, logits, whole, wrapped
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

TARGET = torch.tensor([61, 77, 53, 90, 84, 59, 72, 66])
"""A chunk that shares no word with the others."""
PROMPT = torch.tensor([[59, 53, 66, 100, 98]])
STORES: dict[str, Any] = {
    "ram": None,
    "mmap": "mmap",
    "tiered": "tiered",
    "int8": {"name": "quantized", "format": "int8"},
    "tiered int8": {"name": "tiered", "inner": {"name": "quantized", "format": "int8"}},
}


def other(seed: int, tokens: int = CHUNK + 3) -> Tensor:
    """``[tokens]`` of words that neither the target nor the prompt has."""
    return torch.randint(2, 50, (tokens,), generator=torch.Generator().manual_seed(seed))


def told(memory: mplus.Memory, last: int = 2) -> mplus.Memory:
    """Others, the target, and others again."""
    memory.write(other(0), "s0")
    memory.write(TARGET, "target")
    for turn in range(1, last):
        memory.write(other(turn), f"s{turn}")
    return memory


def plain(model: Any, folder: Path, store: Any) -> mplus.Memory:
    return told(model.new_memory(store=store))


def forgotten(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memory = plain(model, folder, store)
    memory.forget("s0")
    memory.forget("s1")
    return memory


def replaced(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memory = model.new_memory(store=store)
    memory.write(other(3), "target")
    memory.write(other(4), "s0")
    memory.replace("target", TARGET)
    return memory  # type: ignore[no-any-return]


def forked(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memory = plain(model, folder, store)
    fork = memory.fork()
    memory.forget("target")
    memory.write(other(5), "s5")
    return fork


def selected(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memory = model.new_memory(2, store=store)
    memory.write([other(0), TARGET], ["s0", "target"])
    memory.write([None, other(1)], [None, "s1"])
    return memory.select([1])  # type: ignore[no-any-return]


def together(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memories = [model.new_memory(store=store) for _ in range(2)]
    for texts in ([other(0), other(1)], [other(2), TARGET], [other(3, 30), other(4)]):
        mplus.write_together(memories, texts)
    return memories[1]  # type: ignore[no-any-return]


def in_pieces(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memory = model.new_memory(store=store)
    memory.write_pieces([other(0, CHUNK), TARGET[:5], TARGET[5:]], "target")
    return memory  # type: ignore[no-any-return]


def saved(model: Any, folder: Path, store: Any) -> mplus.Memory:
    plain(model, folder, store).save(folder / "saved")
    return mplus.Memory.load(folder / "saved", model, store=store)


def journalled(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memory = told(mplus.Memory.open(folder / "kept", model, store=None if store == "mmap" else store))
    assert memory.directory is not None
    memory.directory.close()  # without a checkpoint: everything comes from the journal
    return mplus.Memory.open(folder / "kept", model, read_only=True)


def reopened(model: Any, folder: Path, store: Any) -> mplus.Memory:
    with mplus.Memory.open(folder / "kept", model, store=None if store == "mmap" else store) as memory:
        told(memory)
    with mplus.Memory.open(folder / "kept", model) as memory:
        memory.forget("s0")
    return mplus.Memory.open(folder / "kept", model, read_only=True)


def within_bytes(model: Any, folder: Path, store: Any) -> mplus.Memory:
    memory = model.new_memory(store=store, bytes_budget=16_000 if isinstance(store, dict) else 32_000)
    for turn in range(9):
        memory.write(other(turn), f"s{turn}")
    memory.write(TARGET, "target")
    assert 0 < len(memory.states[0].chunk_length) < 19, "some left"
    return memory  # type: ignore[no-any-return]


LIVES: list[Callable[[Any, Path, Any], mplus.Memory]] = [
    plain, forgotten, replaced, forked, selected, together, in_pieces, saved, journalled, reopened, within_bytes
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return wrapped(retrieved_chunks=1, long_term_tokens=None)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """``[5, V]``: the decoder that has the target in front of the prompt."""
    ids = whole(TARGET, PROMPT[0])
    with torch.no_grad():
        found: Tensor = BY_NAME["llama"].build(0)(ids).logits[0, -PROMPT.shape[1] :]
    return found


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_it_reads_the_text_that_was_told(life: Any, store: str, model: Any, expected: Tensor, tmp_path: Path) -> None:
    memory = life(model, tmp_path, STORES[store])
    close = 0.1 if "int8" in store else tiny.rounding()
    found = logits(model, PROMPT, memory)[0]
    assert float((found - expected).abs().max()) <= close
    both = logits(model, PROMPT.expand(2, -1), memory.select([0, 0]))
    assert float((both - expected).abs().max()) <= close
    assert float((expected - logits(model, PROMPT)[0]).abs().max()) > 0.5, "memory must matter"
