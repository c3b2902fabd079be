"""SmolLM2 with M+: where the recipe ``smollm2`` begins, and what its training takes a step towards."""

from __future__ import annotations

import copy

import torch

import mplus
from mplus.testing.rounding import check_close
from mplus.training import train
from mplus.training.recipe.files import read_recipe

TOLD = (
    "It was raining when they came home. Gwen Norton keeps a hedgehog in the garden, and everybody who passes by "
    "the fence in the morning stops for a while to look at the small animal. Nobody had thought of that before. The "
    "home of Jerome Porter is in Helsinki, as his letters say, and he means to stay there for the rest of the year."
)


@torch.no_grad()
def test_the_recipe_begins_where_nothing_is_left_to_learn(decoder, tokenizer):
    """Untrained, with a row for every token, M+ reads two chunks as the decoder reads their text."""
    recipe = read_recipe("smollm2").recipe
    sizes = recipe.stages[0].memory
    config = recipe.memory.to_dict() | sizes | {"adapters": None}
    ids = torch.tensor([tokenizer(TOLD, add_special_tokens=False)["input_ids"]])
    chunk = recipe.memory.chunk_tokens
    told, asked = ids[:, : 2 * chunk], ids[:, 2 * chunk :]
    text = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), told, asked], 1)
    plain = decoder(text).logits[:, -asked.shape[1] :]
    exact = copy.deepcopy(decoder).double()(text).logits[:, -asked.shape[1] :]
    model = mplus.wrap(copy.deepcopy(decoder), mplus.MPlusConfig.from_dict(config))
    memory = model.new_memory()
    memory.write(told[0])
    check_close(model(asked, memory=memory).logits, plain, exact)


def test_its_first_steps_make_it_answer_better(folder):
    """Eight steps of each stage: facts told in a novel, and asked from memory."""
    settings = {"metrics.every_steps": 4, "data.notes.chat": 0.0, "optimizer.warmup_steps": 2}
    result = train("smollm2", settings=settings | {"model.path": str(folder)}, steps=8, progress=False)
    losses = [record["single_context/loss"] for record in result.records if "single_context/loss" in record]
    assert len(losses) == 4
    assert losses[1] < 0.7 * losses[0]
    assert losses[3] < losses[0]
