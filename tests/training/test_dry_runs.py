"""The shipped recipes, at the tiny size they give themselves."""

from __future__ import annotations

import math

import pytest

from mplus.training import train
from mplus.training.recipe.files import read_recipe
from mplus.training.setup import make_model
from tests.training.recipes import SHIPPED

PUBLISHED = ("llama3-8b-stage1", "llama3-8b-stage2", "llama3-8b-stage3")


@pytest.mark.parametrize(
    "name",
    # Stage 3 does all that stages 1 and 2 do, and recall-tiny all that recall-long does.
    [
        pytest.param(name, marks=pytest.mark.nightly if name in {*PUBLISHED[:2], "recall-long"} else ())
        for name in SHIPPED
    ],
)
def test_a_dry_run_does_every_stage(name):
    result = train(name, dry_run=True)
    assert [stage["name"] for stage in result.stages] == [stage.name for stage in read_recipe(name).recipe.stages]
    assert math.isfinite(result.metrics["total_loss"])
    # Whatever sizes its stages had to themselves.
    wanted = result.recipe.memory.memory_tokens_per_chunk
    assert wanted in (None, result.model.mplus_config.memory_tokens_per_chunk)
    if result.recipe.stages[-1].retriever_loss is not None:
        assert any(name.endswith("retriever_loss") for name in result.metrics)


def test_the_published_stages_have_the_published_sizes_and_rates():
    one, two, three = (read_recipe(name).recipe for name in PUBLISHED)
    for recipe in (one, two, three):
        assert recipe.memory.chunk_tokens == 512
        assert recipe.memory.memory_tokens_per_chunk == 256
        assert (recipe.memory.adapters.rank, recipe.memory.adapters.alpha) == (16, 32.0)
        assert recipe.optimizer.clip is None
        plain = sum(e.probability for e in recipe.stages[0].objectives if e.name == "plain_lm")
        assert plain == (0.10 if recipe is one else 0.05)
    assert [r.memory.short_term_tokens for r in (one, two, three)] == [12_800, 12_800, 10_240]
    assert [r.optimizer.learning_rate for r in (one, two, three)] == [3.68e-4, 3.68e-5, 3.68e-5]
    assert [r.optimizer.retriever_learning_rate for r in (two, three)] == [1e-4, 1e-4]
    assert [r.stages[0].revisit.renew for r in (one, two, three)] == [1.0, 1.0, 0.2]
    assert three.memory.retrieved_tokens == 2560
    assert three.stages[0].long_term


class Tokens:
    """As many tokens as the recipe's tokenizer will have."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __len__(self):
        return 8192


def test_small_gpu_has_at_most_16_million_parameters_with_everything():
    recipe = read_recipe("small-gpu").recipe
    model = make_model(recipe, 0, Tokens())
    assert model.config.vocab_size == recipe.model.tokenizer.vocabulary
    assert sum(parameter.numel() for parameter in model.parameters()) <= 16_000_000
    assert recipe.checkpoints.every_minutes <= 5
