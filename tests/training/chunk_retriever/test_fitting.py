"""The fit of the maps: what it learns, what it keeps, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve

from mplus.errors import TrainingError
from mplus.training.chunk_retriever.fitting import FitOptions, PooledPairs, fit

DEPTH, WIDTH = 3, 12
OPTIONS = FitOptions(layers=1, rank=8, steps=200, batch=64, learning_rate=1e-2, dropout=0.0, weight_decay=0.0)


def pairs(count: int, seed: int) -> PooledPairs:
    """Queries say in their last six numbers what passages say in their first six; the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    passages, queries = (torch.randn(count, DEPTH, WIDTH, generator=generator) for _ in range(2))
    own = torch.randn(count, 1, WIDTH // 2, generator=generator)
    passages[..., :6], queries[..., 6:] = own + 20, own - 20
    return PooledPairs(passages.half(), queries.half(), torch.arange(count))


def recall(maps, apart: PooledPairs) -> float:
    found = (
        maps.of_queries(apart.queries[:, maps.layers].float())
        @ maps.of_chunks(apart.passages[:, maps.layers].float()).T
    )
    return float((found.argmax(1) == apart.right).double().mean())


def test_maps_bring_together_what_belongs_together():
    """No cosine finds it: both say it in other numbers. After the fit it is found for pairs never seen."""
    apart = pairs(60, 1)
    before, _ = fit("d", pairs(400, 0), apart, evolve(OPTIONS, steps=0))
    after, losses = fit("d", pairs(400, 0), apart, OPTIONS)
    assert recall(before, apart) < 0.15
    assert recall(after, apart) > 0.6
    assert losses[0]["step"] == 0
    assert min(one["held_out_loss"] for one in losses) < losses[0]["held_out_loss"] / 2


def test_at_the_start_nothing_is_changed():
    maps, _ = fit("d", pairs(50, 0), pairs(20, 1), evolve(OPTIONS, steps=0))
    means = pairs(5, 2).passages[:, maps.layers].float()
    plain = torch.nn.functional.normalize((means - maps.chunks[0]) / maps.chunks[1], dim=-1).flatten(1)
    torch.testing.assert_close(maps.of_chunks(means), plain)
    assert bool(maps.chunk_down.any())


def test_what_does_not_help_on_held_out_text_is_not_kept():
    """Noise can be learned by heart, and is of no use elsewhere."""
    generator = torch.Generator().manual_seed(0)
    noise = [
        PooledPairs(*(torch.randn(64, DEPTH, WIDTH, generator=generator) for _ in range(2)), torch.arange(64))
        for _ in range(2)
    ]
    maps, losses = fit("d", *noise, evolve(OPTIONS, temperature=1.0, patience=40, learning_rate=0.1))
    assert losses[-1]["held_out_loss"] > losses[0]["held_out_loss"]
    assert losses[-1]["step"] < 200
    best = min(losses, key=lambda one: one["held_out_loss"])
    again, _ = fit("d", *noise, evolve(OPTIONS, temperature=1.0, patience=40, learning_rate=0.1, steps=best["step"]))
    assert torch.equal(maps.chunk_up, again.chunk_up)


def test_a_seed_says_all_and_the_random_numbers_of_others_stay():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, three = (
        fit("d", pairs(50, 0), pairs(20, 1), evolve(OPTIONS, steps=3, seed=seed))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.query_down, two.query_down)
    assert not torch.equal(one.query_down, three.query_down)


def test_a_loss_that_is_not_finite_ends_it():
    bad = pairs(50, 0)
    bad.queries[3, :, 0] = torch.inf
    with pytest.raises(TrainingError, match="the loss must be finite"):
        fit("d", bad, pairs(20, 1), evolve(OPTIONS, steps=5))
