"""Recipes: what they say, what they refuse, and how they are changed from outside."""

from __future__ import annotations

import json
import tomllib

import pytest

from mplus.errors import ConfigError, UnknownNameError
from mplus.training.recipe import FOLDER
from mplus.training.recipe.files import differences, find_recipe, parse_recipe, read_recipe
from tests.training.recipes import SHIPPED, recipe


def test_plain_data_reads_back_as_the_same_recipe():
    made = parse_recipe(recipe(validation={"every_steps": 5, "objectives": [{"name": "plain_lm", "data": "many"}]}))
    plain = json.loads(json.dumps(made.to_dict()))
    again = parse_recipe(plain)
    assert json.loads(json.dumps(again.to_dict())) == plain
    assert again == made
    assert made.stages[1].revisit.renew == 0.5
    assert made.stages[0].objectives[0].objective.options.chunks == 2
    assert made.steps == 12


BAD = [
    # unknown names and fields
    ({"streems": 2}, "recipe 'tiny': 'streems' is not a field of Recipe; did you mean 'streams'"),
    ({"optimizer__lerning_rate": 1}, "optimizer: 'lerning_rate' is not a field of Optimizer; did you mean 'learning_r"),
    ({"model__build__model_type": 3}, "model: build: model_type must be a text"),
    ({"data__one__kind": "recal"}, "data: one: no data source is called 'recal'; did you mean 'recall'"),
    ({"data__one__questionss": 2}, "data: one: 'questionss' is not a field of RecallOptions; did you mean 'questions'"),
    ({"data__one": {"episode": 2}}, r"data: one: a data set must be a table with a 'kind' \(copying, documents"),
    ({"stages__0__objectives__0__name": "single"}, r"stages: 0 \(first\): objectives: 0 \(single\): no objective is"),
    ({"stages__0__objectives__0__chunk": 2}, "'chunk' is not a field of SingleContext.Options; did you mean 'chunks'"),
    (
        {"stages__0__objectives__0__data": "none"},
        r"stages: 0 \(first\): objectives: 0 .*: data must name a data set \(",
    ),
    ({"stages__1__retriever_loss__kind": "mse"}, "retriever_loss: kind must be one of 'contrastive', 'bce', got 'mse'"),
    (
        {"stages__0__until": {"metric": "acc", "at_least": 0.9}},
        "until.metric must be one of accuracy, loss, .*got 'acc'",
    ),
    # values
    ({"streams": 0}, "streams must be a whole number of at least 1, got 0"),
    ({"name": "a/b"}, "name must be a name without spaces and slashes, got 'a/b'"),
    ({"optimizer__learning_rate": -1}, "optimizer: learning_rate must be a number of at least 0, got -1"),
    ({"optimizer__betas": [0.9, 1.0]}, "optimizer: betas must be two numbers of at least 0 and below 1, got"),
    ({"optimizer__clip": 0}, "optimizer: clip must be a number above 0, got 0"),
    ({"optimizer__schedule": "step"}, "optimizer: schedule must be one of 'cosine', 'linear', 'constant', got 'step'"),
    ({"optimizer__fall_from": "third"}, r"optimizer: fall_from must name a stage \(first, second\), got 'third'"),
    (
        {"optimizer__fall_from": "first", "optimizer__schedule_steps": 5},
        "optimizer: fall_from and schedule_steps must not both be given, got 'first' and 5",
    ),
    ({"memory__chunk_tokens": 0}, "memory: chunk_tokens must be a whole number of at least 1, got 0"),
    ({"stages": []}, "stages: must be a list of at least one table, got"),
    ({"stages__1__steps": True}, r"stages: 1 \(second\): steps must be a whole number of at least 1, got True"),
    ({"stages__1__revisit__probability": 1.5}, "revisit: probability must be a number from 0 to 1, got 1.5"),
    ({"checkpoints__every_minutes": 0}, "checkpoints: every_minutes must be a number above 0, got 0"),
    # contradictions
    ({"model__path": "stories260K"}, "model: exactly one of path and build must be given, got both"),
    ({"model": {"tokenizer": "recall"}}, "model: exactly one of path and build must be given, got neither"),
    (
        {"model__dtype": "bfloat16"},
        "model: dtype must be 'float32' where optimizer.parameters is 'all', got 'bfloat16'",
    ),
    ({"model__tokenizer": {"data": ["one"]}}, "must name data sets of kind 'documents', got 'one' of kind 'recall'"),
    ({"optimizer__parameters": "adapters"}, "parameters must be 'all' for a decoder that is built from nothing"),
    ({"memory__variant": "published"}, "memory: variant must be 'paper' for training, got 'published'"),
    ({"memory__bytes_budget": "8GiB"}, "memory: bytes_budget must be left out of a recipe, .* got '8GiB'"),
    ({"data__many__chunk_tokens": 16}, r"many.chunk_tokens must be at most memory.chunk_tokens \(12\), got 16"),
    (
        {"stages__0__memory": {"chunk_tokens": 8}},
        r"\(first\): memory: must be sizes that no parameter depends on \(mem",
    ),
    ({"stages__0__memory": {"long_term_tokens": 0}}, "long_term_tokens must be 0 in every stage or in none"),
    ({"stages__1__name": "first"}, "every stage must have a name of its own, got 'first' twice"),
    ({"stages__1__objectives__0__probability": 0.5}, r"the probabilities of objectives must make 1, got 0.9"),
    ({"stages__1__objectives__0__probability": None}, "probability must be given for each of several objectives"),
    (
        {"stages__0__objectives__0__beside": 0.5},
        "data must be given|objectives must have one that does not stand beside",
    ),
    ({"stages__0__objectives__1__probability": 0.5}, "one of probability and beside must be given, got 0.5 and 0.5"),
    ({"stages__0__objectives__0": {"name": "revisit", "data": "one"}}, "set the table 'revisit' of the stage instead"),
    ({"stages__0__objectives__1__name": "single_context"}, "data must be given for an objective that writes"),
    ({"data__one__window_tokens": 0}, "data must be a data set with windows: set window_tokens of 'one'"),
    ({"stages__1__objectives__1__data": "one"}, r"data 'many' lets streams start anew \(episode\)|data 'one' lets"),
    ({"stages__1__objectives__0": {"name": "plain_lm", "data": "many", "probability": 0.6}}, None),
    (
        {"stages__0__revisit": {}, "stages__0__objectives__0": {"name": "plain_lm", "data": "one"}},
        "revisit must go with",
    ),
    ({"memory__long_term_tokens": 0}, "long_term must be false where memory.long_term_tokens is not a number"),
    ({"memory__long_term_tokens": None}, "long_term must be false where memory.long_term_tokens is not a number"),
    (
        {"memory__long_term_tokens": 0, "stages__1__long_term": False},
        "retriever_loss must be left out where there is no",
    ),
    (
        {"memory__mechanism": "memoryllm", "stages__1__long_term": False},
        "retriever_loss must be left out where there is no retriever, got memory.mechanism 'memoryllm'",
    ),
    ({"memory__retriever": "random"}, "the retriever 'random' cannot be trained|no retriever is called 'random'"),
    ({"stages__1__retriever_loss__kind": "bce"}, "kind 'bce' needs scores between 0 and 1, got .* 'mean_dot'"),
    ({"stages__0__on_failure": "restart"}, "on_failure must go with until, got 'restart' and nothing"),
    (
        {"stages__0__until": {"metric": "window_accuracy", "at_least": 0.5, "window": 5}},
        r"until.window must be at most steps \(4\), got 5",
    ),
    (
        {"validation": {"every_steps": 1, "objectives": [{"name": "window", "beside": 1.0}]}},
        "validation: objectives: 0",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=range(len(BAD)))
def test_what_a_recipe_may_not_say(settings, message):
    if message is None:
        parse_recipe(recipe(**settings))
        return
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        parse_recipe(recipe(**settings))


def test_a_frozen_decoder_needs_adapters_or_a_mechanism_with_parameters():
    frozen = {"model__path": "stories260K", "optimizer__parameters": "adapters", "memory__adapters": None}
    without = ("model.build", "model.tokenizer", "stages.1.retriever_loss")
    assert parse_recipe(recipe(without, **frozen)).memory.adapters is None
    message = "parameters must be 'all' where memory.adapters is None, got 'adapters': the mechanism 'kv' has no"
    with pytest.raises(ConfigError, match=message):
        parse_recipe(recipe(without, **frozen, memory__mechanism="kv"))


def test_bce_goes_with_a_score_between_0_and_1():
    table = recipe(stages__1__retriever_loss__kind="bce", memory__retriever__score="sigmoid_mean")
    assert parse_recipe(table).stages[1].retriever_loss.kind == "bce"


def test_metrics_that_a_stage_has_can_be_waited_for():
    for metric in ("recall_1", "retriever_loss", "accuracy"):
        parse_recipe(recipe(stages__1__until={"metric": metric, "at_least": 0.5, "window": 2}))
    with pytest.raises(ConfigError, match=r"until.metric must be one of accuracy, loss, window_accuracy, window_loss"):
        parse_recipe(recipe(stages__0__until={"metric": "recall_1", "at_least": 0.5, "window": 2}))


def test_settings_from_outside():
    found = read_recipe(
        recipe(),
        settings={"optimizer.learning_rate": 0.5, "stages.*.streams": 7, "stages.1.revisit.renew": 0.1},
        steps=3,
    ).recipe
    assert found.optimizer.learning_rate == 0.5
    assert [stage.streams for stage in found.stages] == [7, 7]
    assert [stage.steps for stage in found.stages] == [3, 3]
    assert found.stages[1].revisit.renew == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages.2.steps": 1}, r"'stages.2.steps' must have a number below 2 or \* where it has '2'"),
        ({"name.x": 1}, "'name.x' must be a path through tables of the recipe, which ends before 'x'"),
        ({"stages.0": 1}, "stages: 0: "),
    ],
)
def test_settings_that_lead_nowhere(settings, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe(), settings=settings)


def test_a_dry_run_is_what_the_recipe_says():
    table = recipe()
    with pytest.raises(ConfigError, match=r"recipe 'tiny' must have a table \[dry_run\]"):
        read_recipe(table, dry_run=True)
    table["dry_run"] = {"remove": ["stages.1.revisit"], "set": {"stages.*.steps": 1, "streams": 1}}
    assert read_recipe(table).recipe.stages[1].revisit is not None
    small = read_recipe(table, dry_run=True, settings={"streams": 5}).recipe
    assert small.stages[1].revisit is None
    assert (small.steps, small.streams) == (2, 5)
    table["dry_run"]["remove"] = ["stages.1.revisits"]
    with pytest.raises(ConfigError, match=r"dry_run: 'stages.1.revisits' must be a setting of the recipe"):
        read_recipe(table, dry_run=True)


def test_files(tmp_path):
    with pytest.raises(UnknownNameError, match=r"a recipe must be a file or the name of a shipped one, got 'nowhere'"):
        find_recipe("nowhere")
    path = tmp_path / "bad.toml"
    path.write_text("name = ", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.toml must be valid TOML"):
        read_recipe(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_sound(name):
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["name"] == name
    recipe = read_recipe(name).recipe
    assert recipe.name == name


def test_differences_name_the_place():
    then = {"a": {"b": [1, 2]}, "c": 1}
    assert differences(then, {"a": {"b": [1, 3]}, "d": 2}) == [
        "a.b.1: 2 then, 3 now",
        "c: 1 then, None now",
        "d: None then, 2 now",
    ]
