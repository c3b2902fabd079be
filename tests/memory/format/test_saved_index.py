"""The index of a retriever is saved with the rows it is over, and taken over when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.memory import Memory
from mplus.retrievers import ivf
from tests.memory.tiny import build, prompts

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.two_computations

RETRIEVER = {"name": "faiss_ivf", "width": 8, "least": 3, "cells": 2, "probes": 1}


@pytest.fixture
def trainings(monkeypatch: Any) -> list[int]:
    """One entry for every index that was trained."""
    counted: list[int] = []
    train = ivf.IvfIndex.train

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return train(*args, **kwargs)

    monkeypatch.setattr(ivf.IvfIndex, "train", staticmethod(counting))
    return counted


def read(model: Any, memory: Memory) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(prompts(1), memory=memory).logits
    return logits


def test_a_saved_index_is_used_again(tmp_path: Path, trainings: list[int]) -> None:
    model = build(retriever=RETRIEVER)
    memory = model.new_memory()
    memory.write(torch.randint(2, 60, (200,), generator=torch.Generator().manual_seed(1)))
    memory.save(tmp_path / "never read")
    assert not trainings
    expected = read(model, memory)
    made = len(trainings)
    assert made
    memory.save(tmp_path / "read")
    again = Memory.load(tmp_path / "read", model)
    assert torch.equal(read(model, again), expected)
    assert len(trainings) == made
    read(model, Memory.load(tmp_path / "never read", model))
    assert len(trainings) == 2 * made


def test_an_index_lives_with_its_memory(tmp_path: Path, trainings: list[int]) -> None:
    model, text = build(retriever=RETRIEVER), torch.randint(2, 60, (200,), generator=torch.Generator().manual_seed(1))
    with Memory.open(tmp_path / "alice", model) as memory:
        memory.write(text)
        expected = read(model, memory)
        made = len(trainings)
    with Memory.open(tmp_path / "alice", model) as memory:
        assert torch.equal(read(model, memory), expected)
        assert len(trainings) == made
        memory.write(text[:20])
        changed = read(model, memory)
    with Memory.open(tmp_path / "alice", model, read_only=True) as memory:
        assert torch.equal(read(model, memory), changed)
        assert len(trainings) == made
