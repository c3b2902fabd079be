"""Which objective a step has, and when an earlier text is read again."""

from __future__ import annotations

import attrs
import pytest
import torch

from mplus.training.batch import Batch
from mplus.training.curriculum import Curriculum
from mplus.training.recipe.files import parse_recipe
from tests.training.recipes import recipe


def stage_of(objectives, revisit=None, beside=()):
    mains = [
        {"name": name, "data": "many", "probability": p, **({"chunks": 3} if name == "multi_chunk" else {})}
        for name, p in objectives.items()
    ]
    extra = [{"name": "window", "data": "one", "beside": share} for share in beside]
    table = recipe(stages__1__objectives=[*mains, *extra])
    table["data"]["many"] |= {"kind": "questions", "chunk_tokens": 12}
    for key in ("language", "ages", "episode"):
        table["data"]["many"].pop(key)
    table["data"]["one"] = {**table["data"]["many"], "window_tokens": 100}
    table["stages"][0]["objectives"] = [{"name": "plain_lm", "data": "many"}]
    table["stages"][1]["revisit"] = revisit
    return parse_recipe(table).stages[1]


def batch(number, chunks):
    text = torch.full((1, 1, 2), number)
    return Batch(
        chunks=torch.zeros(1, chunks, 4, dtype=torch.int64),
        sources=torch.zeros(1, chunks, dtype=torch.int64),
        texts=text,
        labels=text,
        mask=torch.ones_like(text, dtype=torch.bool),
        text_sources=torch.full((1, 1), number),
    )


def simulate(stage, steps, seed=0):
    """Names of what the steps do, and for every revisit how many steps wrote since the one that brought its text."""
    curriculum, names, distances, wrote = Curriculum(stage, seed), [], [], [0]
    for step in range(steps):
        plan = curriculum.plan(step)
        if plan.revisit:
            names.append("revisit")
            distances.append(wrote[-1] - wrote[int(curriculum.revisit_batch.text_sources) + 1])
            used = curriculum.revisit_batch
        else:
            names.append(plan.main.name)
            used = batch(step, plan.main.objective.chunks)
        wrote.append(wrote[-1] + (used.chunks.shape[1] > 0))
        curriculum.record(plan, used)
    return names, distances


STAGE_1 = {"plain_lm": 0.1, "two_chunk": 0.9 * 0.2, "multi_chunk": 0.9 * 0.8}
STAGE_3 = {"plain_lm": 0.05, "two_chunk": 0.95 * 0.2, "multi_chunk": 0.95 * 0.8}


@pytest.mark.parametrize(
    ("objectives", "renew", "shares", "distance"),
    [  # spec section 2.7: shares of steps in percent, and the mean distance of a revisit
        (STAGE_1, 1.0, (10, 15, 62, 13), 5.0),
        (STAGE_3, 0.2, (5, 16, 64, 15), 24.6),
    ],
)
def test_the_published_stages_do_what_the_released_code_does(objectives, renew, shares, distance):
    names, distances = simulate(stage_of(objectives, {"probability": 0.2, "renew": renew}), 40_000)
    found = [100 * names.count(name) / len(names) for name in ("plain_lm", "two_chunk", "multi_chunk", "revisit")]
    assert found == pytest.approx(shares, abs=0.9)
    assert sum(distances) / len(distances) == pytest.approx(distance, rel=0.06)


def test_a_revisit_never_follows_a_revisit_or_a_fresh_text():
    names, _ = simulate(stage_of({"two_chunk": 1.0}, {"probability": 1.0}), 12)
    # Kept, then something is written after it, then it is read; the step after that keeps the next one.
    assert names == ["two_chunk", "two_chunk", "revisit"] * 4


def test_objectives_that_write_nothing_do_not_count():
    stage = stage_of({"plain_lm": 0.5, "two_chunk": 0.5}, {"probability": 1.0})
    names, _ = simulate(stage, 400)
    writing = [name for name in names if name != "plain_lm"]
    assert writing[:9] == ["two_chunk", "two_chunk", "revisit"] * 3
    assert 150 < names.count("plain_lm") < 250


def test_forgetting_takes_the_kept_text_away():
    curriculum = Curriculum(stage_of({"two_chunk": 1.0}, {"probability": 1.0}), 0)
    for step in range(2):
        curriculum.record(curriculum.plan(step), batch(step, 1))
    assert curriculum.plan(2).revisit
    curriculum.reset()
    assert not curriculum.plan(2).revisit


def test_steps_depend_on_seed_and_place_alone():
    stage = stage_of(STAGE_1, beside=[0.3])
    plans = [Curriculum(stage, 5).plan(step) for step in range(300)]
    again = [Curriculum(stage, 5).plan(step) for step in reversed(range(300))][::-1]
    assert [(p.main.name, p.beside) for p in plans] == [(p.main.name, p.beside) for p in again]
    other = [Curriculum(stage, 6).plan(step).main.name for step in range(300)]
    assert [p.main.name for p in plans] != other
    assert 60 < sum(bool(p.beside) for p in plans) < 120


def test_a_restored_curriculum_goes_on_as_the_saved_one():
    stage = stage_of(STAGE_3, {"probability": 0.5, "renew": 0.3})
    curriculum = Curriculum(stage, 1)
    for step in range(100):
        plan = curriculum.plan(step)
        twin = Curriculum(stage, 1)
        twin.load_state_dict(curriculum.state_dict())
        assert twin.plan(step) == plan or attrs.asdict(twin.plan(step)) == attrs.asdict(plan)
        used = curriculum.revisit_batch if plan.revisit else batch(step, plan.main.objective.chunks)
        curriculum.record(plan, used)
        twin.record(plan, used)
        assert (twin.chunks_since, twin.last_was_revisit, twin.revisit_batch is None) == (
            curriculum.chunks_since,
            curriculum.last_was_revisit,
            curriculum.revisit_batch is None,
        )
        if twin.revisit_batch is not None:
            assert torch.equal(twin.revisit_batch.texts, curriculum.revisit_batch.texts)
