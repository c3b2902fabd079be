"""A mechanism or setting that an evaluation or a loss would not follow is refused by name before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.errors import ConfigError, NotSupported, UnknownNameError
from mplus.evaluation.abstention import abstention
from mplus.evaluation.context import context_value
from mplus.evaluation.execution import ParallelStreams
from mplus.evaluation.health import retriever_health
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retention import make_arms, retention
from mplus.evaluation.tasks.facts import Facts
from mplus.facts.language import Language
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.mplus import MPlusMechanism
from mplus.training.decoder import make_batched_streams
from mplus.training.recipe.files import parse_recipe
from tests.evaluation.bench import execution
from tests.memory import tiny
from tests.training.recipes import recipe

FACTS = Facts(language=Language(relations=2, firsts=6, lasts=6), ages=(0, 2, 5), streams=2, rounds=1)
NEVER_CALLED = (
    r"mechanism must be 'mplus' or 'memoryllm' here, got 'diary' \(.*Diary.*\): evaluations .* of 'diary' would never "
    "be called"
)


class Diary(MPlusMechanism):
    """A mechanism of a plug-in: of the rows that leave short-term memory it keeps the first of each layer."""

    name = "diary"
    called = 0

    def keep_dropped(self, state, dropped, context):
        type(self).called += 1
        return super().keep_dropped(state, [rows.select(torch.arange(min(1, len(rows)))) for rows in dropped], context)


@pytest.fixture(scope="module", autouse=True)
def registered():
    MECHANISMS.register("diary", Diary)
    yield
    MECHANISMS.unregister("diary")


@pytest.fixture(scope="module")
def decoder(registered):
    return tiny.build(mechanism="diary")


def test_the_plugin_works_as_a_memory(decoder):
    """What is refused below is refused for what would not be called, not because the mechanism is broken."""
    memory = decoder.new_memory()
    memory.write(tiny.ids(5 * tiny.CHUNK))
    assert Diary.called == 5
    assert memory.stores[0].count(0) == 2  # of five writes two found the short-term memory full


def test_a_recipe_names_a_mechanism_that_there_is():
    assert (
        parse_recipe(recipe(("stages.1.retriever_loss",), memory__mechanism="diary")).memory.mechanism.name == "diary"
    )
    with pytest.raises(UnknownNameError, match="mplus"):
        parse_recipe(recipe(memory__mechanism="mplsu"))


@pytest.fixture(scope="module")
def trained(registered, tmp_path_factory):
    """The decoder that comes with mplus, as if it had been trained with the plug-in."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(Path(mplus.__file__).parent / "data" / "recall-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config["mplus"]["mechanism"] = "diary"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def evaluate(command, trained, *options):
    return CliRunner().invoke(app, ["eval", command, "--recipe", "recall-tiny", "--model", str(trained), *options])


def test_eval_retriever_traces_what_it_brings_back(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("mplus.cli.evaluation.QUESTIONS", 4)
    report = tmp_path / "report.json"
    options = ("--ages", "9", "--retriever", "random", "--retrieved-tokens", "4", "--json", str(report))
    done = evaluate("retriever", trained, *options)
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())["by_retrieved_tokens"]["4"]
    assert set(found) == {"own", "random"}
    assert found["own"]["questions"] > 0


def test_eval_abstention_asks_about_what_it_was_never_told(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("mplus.cli.evaluation.QUESTIONS", 4)
    report = tmp_path / "report.json"
    done = evaluate("abstention", trained, "--ages", "0,9", "--json", str(report))
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    assert found["judged_on"] == {"told": 4, "not_told": 4}
    assert "best_score" in found["features"]


def test_eval_retention_measures_it_under_its_own_name(trained, tmp_path):
    written, report = Diary.called, tmp_path / "report.json"
    done = evaluate("retention", trained, "--questions", "2", "--ages", "0,9", "--json", str(report))
    assert done.exit_code == 0, done.output
    assert Diary.called > written
    arms = {arm["name"]: arm for arm in json.loads(report.read_text())["arms"]}
    assert set(arms) == {"none", "window", "bm25", "full-context", "ceiling", "snapkv", "diary", "diary-oracle"}
    assert arms["diary"]["questions_by_age"] == {"0": 2, "9": 2}
    assert arms["diary"]["correct_by_age"]["0"] == 2  # short-term memory alone can answer
    assert arms["diary"]["state_bytes"] > 0
    done = evaluate("retention", trained, "--questions", "2", "--arms", "mplus")
    assert done.exit_code == 2
    assert "none of them would measure it" in " ".join(done.stderr.split())


def test_evaluations_with_dense_memories_refuse_it(decoder):
    for evaluation in (retention, abstention):
        with pytest.raises(ConfigError, match=NEVER_CALLED):
            evaluation(ParallelStreams(decoder, FACTS))
    with pytest.raises(ConfigError, match=NEVER_CALLED):
        context_value(decoder, [tiny.ids(64)] * 2, chunks=2, chunk_tokens=8, text_tokens=8, known_tokens=4)
    with pytest.raises(ConfigError, match=NEVER_CALLED):
        make_batched_streams(decoder.mplus_engine, [0], seed=0, long_term_tokens=0)
    with pytest.raises(ConfigError, match=NEVER_CALLED):
        retriever_health(ParallelStreams(decoder, FACTS))


def test_no_arm_measures_it_under_the_name_of_another(decoder):
    table = execution(decoder=decoder)
    with pytest.raises(NotSupported, match=r"the arms memoryllm, mplus measure .* the decoder's mechanism is 'diary'"):
        make_arms(table, ArmOptions(arms=("memoryllm", "mplus")))
    made, skipped = make_arms(table, ArmOptions(arms=("none", "window")))
    assert [arm.name for arm in made] == ["none", "window"]
    assert not skipped
    made, skipped = make_arms(table, ArmOptions())
    assert [arm.name for arm in made] == ["none", "window", "full-context", "bm25", "ceiling", "diary", "diary-oracle"]
    assert [arm.name for arm in skipped] == ["snapkv"]


FOLLOWED = [
    {"memory__eviction": "lru"},
    {"memory__eviction": {"name": "ttl", "lifetime": 3.0}},
    {"memory__mechanism": {"name": "mplus", "merge_every": 3, "lifetime": 4.0}},
    {"memory__mechanism": {"name": "mplus", "short_ltm": "tile"}},
]


@pytest.mark.parametrize("settings", FOLLOWED, ids=str)
def test_settings_that_batched_streams_would_ignore_go_without_a_retriever_loss(settings):
    """Without one they are followed: ``tests/training/test_separate_streams.py``."""
    assert parse_recipe(recipe(("stages.1.retriever_loss",), **settings)).stages[1].long_term
    with pytest.raises(
        ConfigError, match=r"stages: 1 \(second\): retriever_loss must be left out with memory\.mechanism"
    ):
        parse_recipe(recipe(**settings))


def test_long_term_memory_is_asked_of_a_mechanism_that_has_one():
    with pytest.raises(ConfigError, match=r"\(second\): long_term: mechanism 'memoryllm' has no long-term memory"):
        parse_recipe(recipe(("stages.1.retriever_loss",), memory__mechanism="memoryllm"))


def test_a_decoder_without_long_term_memory_is_measured_without_it():
    config = LlamaConfig(
        vocab_size=len(FACTS.language.vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
    )
    sizes = {**tiny.SIZES, "mechanism": "memoryllm", "adapters": None}
    model = mplus.wrap(LlamaForCausalLM(config), mplus.MPlusConfig.from_dict(sizes), check=False).eval()
    report = retention(ParallelStreams(model, FACTS))
    by_name = {arm.name: arm for arm in report.arms}
    assert by_name["memoryllm"].status == "ok"
    assert report.settings["long_term_tokens"] == 0
    for name in ("mplus", "mplus-random", "mplus-recency", "mplus-oracle"):
        assert (by_name[name].status, by_name[name].reason) == (
            "skipped",
            "the decoder was wrapped without long-term memory",
        )
