"""Training as a whole: what changes, what does not, and how it ends."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from attrs import define, evolve, field

import mplus
from mplus.errors import CheckpointError, ConfigError, NonFiniteError, NotSupported, TrainingError
from mplus.hf.decoders.train_model import choose_trained
from mplus.hf.pretrained.shipped import load_decoder
from mplus.mechanisms.short_term.batched_prefix import ScoreSelector
from mplus.training import train
from mplus.training.data.documents import DocumentOptions, open_documents
from mplus.training.decoder import TrainedDecoder, make_batched_streams
from mplus.training.objectives import OBJECTIVES
from mplus.training.objectives.base import ObjectiveResult
from mplus.training.objectives.full_memory import MultiChunk
from mplus.training.optimizer import clip_gradients, make_optimizer, make_schedule
from mplus.training.recipe.files import read_recipe
from mplus.training.recipe.tables import Optimizer
from mplus.training.run import check_accelerator
from tests.memory import tiny
from tests.training.recipes import recipe

STORIES = {
    "name": "tales",
    "streams": 2,
    "model": {"path": "stories260K"},
    "memory": {
        "chunk_tokens": 16,
        "min_chunk_tokens": 4,
        "memory_tokens_per_chunk": 4,
        "short_term_tokens": 8,
        "retrieved_tokens": 4,
        "long_term_tokens": 16,
        "retriever": {"name": "linear", "width": 8},
        "adapters": {"rank": 2, "dropout": 0.1},
    },
    "optimizer": {"learning_rate": 1e-3, "retriever_learning_rate": 5e-3},
    "data": {"novel": {"kind": "documents", "chunk_tokens": [8, 16], "target_tokens": 24}},
    "stages": [
        {
            "name": "all",
            "steps": 4,
            "long_term": True,
            "retriever_loss": {"candidates": 8},
            "revisit": {"probability": 0.5},
            "objectives": [
                {"name": "single_context", "data": "novel", "probability": 0.25},
                {"name": "two_chunk", "data": "novel", "probability": 0.25, "reader": "read"},
                {"name": "multi_chunk", "data": "novel", "probability": 0.25, "chunks": 3},
                {"name": "repeat", "data": "novel", "probability": 0.25},
                {"name": "plain_lm", "data": "novel", "beside": 0.5, "weight": 0.5},
            ],
        }
    ],
}


@pytest.fixture(scope="module", autouse=True)
def page(tmp_path_factory):
    """Some pages of the novel for ``STORIES``: encoding all of it takes longer than training."""
    (whole,) = open_documents(DocumentOptions(shipped="novel")).iterate()
    path = tmp_path_factory.mktemp("texts") / "novel.txt"
    path.write_text(whole.text[:40_000], encoding="utf-8")
    STORIES["data"]["novel"]["paths"] = str(path)
    return path


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run, with everything it wrote."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return train(recipe(), out=folder)


def test_what_a_run_says_of_itself(run):
    assert run.stages == [{"name": "first", "steps": 4}, {"name": "second", "steps": 8}]
    assert (run.steps, run.restarts, run.seeds, run.missed) == (12, 0, [3], [])
    assert 0 < run.seconds == run.seconds_in_all
    assert json.loads(json.dumps(run.to_dict()))["recipe"] == "tiny"
    assert not run.model.training


def test_metrics_are_means_of_a_few_steps(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.records
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["stage"] for line in lines] == ["first"] * 2 + ["second"] * 4
    first, last = lines[0], lines[-1]
    assert first["single_context/loss"] == first["loss"]
    assert {"single_context/accuracy", "total_loss", "gradient_norm", "learning_rate", "seconds"} <= first.keys()
    assert any("recall_1" in line for line in lines)
    assert "retriever_loss" in last
    assert "retriever_loss" not in first
    assert run.metrics["loss"] == last["loss"]


def test_the_run_folder_says_all_it_takes_to_do_it_again(run):
    assert {path.name for path in run.folder.iterdir()} == {
        *("recipe.json", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "model"),
    }  # no recipe.toml: the recipe was plain data
    assert list((run.folder / "tensorboard").iterdir())
    note = json.loads((run.folder / "run.json").read_text())
    assert {"torch", "transformers", "mplus", "commit", "device", "command", "processes"} <= note["starts"][0].keys()
    assert (note["seeds"], note["restarts"], note["finished"], note["steps"]) == ([3], 0, True, 12)
    resolved = json.loads((run.folder / "recipe.json").read_text())
    assert resolved["optimizer"]["floor"] == 0.1  # defaults are filled in
    again = train(resolved)
    assert same(weights(again.model), weights(run.model))


def test_the_model_loads_and_computes_the_same(run):
    loaded = mplus.from_pretrained(run.folder / "model").eval()
    assert same(weights(loaded), weights(run.model))
    ids = torch.arange(20, 32)[None]
    logits = []
    for model in (loaded, run.model):
        memory = model.new_memory()
        for start in range(4):
            memory.write(ids[0] + start)
        logits.append(model(input_ids=ids, memory=memory).logits)
    assert torch.equal(*logits)


def test_a_folder_with_something_in_it_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"must be an empty folder or not exist yet: go on with what is there by"):
        train(recipe(), out=run.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"must be an empty folder or not exist yet"):
        train(recipe(), out=tmp_path / "file")
    with pytest.raises(ConfigError, match=r"one of out and resume must be given"):
        train(recipe(), out=tmp_path, resume=run.folder)
    with pytest.raises(ConfigError, match=r"a recipe must be given, or a run to resume, got neither"):
        train()


def test_a_run_whose_decoder_cannot_be_made_leaves_nothing_behind(tmp_path):
    wrong = recipe(memory__min_score=0.5)  # seen when the decoder is wrapped, not before
    (tmp_path / "there").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "mine.txt").write_text("kept")
    for out in ("there", "shared/runs/tiny", "new/runs/tiny"):
        with pytest.raises(ConfigError, match="min_score does not go with the mechanism 'mplus'"):
            train(wrong, out=tmp_path / out)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["shared", "shared/mine.txt", "there"]


def test_the_generators_of_the_process_are_left_alone():
    torch.manual_seed(11)
    random.seed(11)
    expected = torch.rand(3), random.random()
    torch.manual_seed(11)
    random.seed(11)
    train(recipe(), steps=1)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_seeds_make_different_models():
    one, other = (train(recipe(), steps=1, seed=seed).model for seed in (1, 2))
    assert not torch.equal(one.mplus.begin, other.mplus.begin)


def test_only_adapters_and_additions_are_trained():
    base = load_decoder().state_dict()
    result = train(STORIES)
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in result.model.state_dict().items()}
    for name, tensor in base.items():
        assert torch.equal(after[name], tensor), name
    untrained = train({**STORIES, "optimizer": {"learning_rate": 0.0}}).model.state_dict()
    moved = {name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, untrained[name])}
    for part in (
        "lora_A.write",
        "lora_A.read",
        "lora_B.write",
        "mplus.begin",
        "mplus.mark",
        "mplus.retriever.key_proj",
    ):
        assert any(part in name for name in moved), part
    labels = {name.partition("/")[0] for name in result.metrics if "/" in name}
    assert len(labels & {"single_context", "two_chunk", "multi_chunk", "repeat", "plain_lm", "revisit"}) >= 3


def test_activations_change_nothing_but_what_is_held():
    """Swapping needs layers besides the last two, which this decoder has."""
    plain = {**STORIES, "memory": {**STORIES["memory"], "adapters": {"rank": 2, "dropout": 0.2}}}
    kept = train(plain, steps=2)
    for settings in ({"activations": "recompute"}, {"activations": "memo", "host_bytes": 10**9}):
        found = train(plain, steps=2, settings={f"optimizer.{name}": value for name, value in settings.items()})
        assert same(weights(found.model), weights(kept.model))
        metrics = [record for record in found.records if "saved_device_bytes" in record]
        assert metrics
        assert all(record["recomputed_tokens"] > 0 for record in metrics[:1])
        assert all((record["saved_host_bytes"] > 0) == (settings["activations"] == "memo") for record in metrics)
        assert "forward" not in found.model.model.layers[0].__dict__
    assert "saved_device_bytes" not in kept.records[0]


def test_bfloat16_computes_in_half_and_trains_in_full_precision():
    result = train(STORIES, steps=2, settings={"optimizer.dtype": "bfloat16"})
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    full = train(STORIES, steps=2)
    assert 0 < abs(result.metrics["loss"] - full.metrics["loss"]) < 0.1


def test_a_frozen_decoder_may_be_in_half_precision():
    model = tiny.build(dtype=torch.bfloat16)
    trained = choose_trained(model, "adapters")
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not model.model.embed_tokens.weight.requires_grad
    streams = make_batched_streams(model.mplus_engine, [0], seed=0, long_term_tokens=8)
    for number in range(4):
        streams.write(tiny.prompts(1, tiny.CHUNK, number), torch.tensor([number]))
    read = TrainedDecoder(model).read(streams, tiny.prompts(1)[None], selector=ScoreSelector(model.mplus.retriever))
    read.logits.float().square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in trained.items() if ".read." in name)


def test_validation_changes_nothing():
    """Its own memories, data and random numbers: the weights are equal bit for bit."""
    objectives = [{"name": "multi_chunk", "data": "novel", "chunks": 2}, {"name": "plain_lm", "data": "novel"}]
    validation = {"every_steps": 1, "steps": 2, "objectives": objectives, "streams": 3, "long_term": True}
    without, with_it = train(STORIES), train({**STORIES, "validation": validation})
    assert same(weights(without.model), weights(with_it.model))
    found = [record for record in with_it.records if "validation/plain_lm/loss" in record]
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert all("validation/multi_chunk/loss" in record for record in found)
    assert "loss" not in found[0]
    # The same batches every time: only training changes what comes out.
    still = train({**STORIES, "validation": validation, "optimizer": {"learning_rate": 0.0}}, steps=2)
    losses = {r["validation/plain_lm/loss"] for r in still.records if "validation/plain_lm/loss" in r}
    assert len(losses) == 1


@pytest.fixture
def broken():
    """An objective whose loss becomes NaN, or whose gradient does, after some steps."""
    calls = []

    class Breaking(MultiChunk):
        @define(frozen=True, kw_only=True)
        class Options(MultiChunk.Options):
            after: int = field(default=5)
            what: str = field(default="loss")

        def __call__(self, decoder, streams, batch, retriever_loss):
            calls.append(1)
            outcome = super().__call__(decoder, streams, batch, retriever_loss)
            if len(calls) <= self.options.after:
                return outcome
            extra = decoder.model.mplus.begin.sum() * 0.0
            if self.options.what == "gradient":  # finite, but its slope at 0 is not
                return ObjectiveResult(outcome.loss + extra.square().sqrt(), outcome.metrics)
            return ObjectiveResult(outcome.loss * float("nan"), outcome.metrics)

    OBJECTIVES.register("breaking", Breaking)
    yield calls
    OBJECTIVES.unregister("breaking")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_training(broken, what, tmp_path):
    table = recipe(
        ("stages.1",), stages__0__objectives=[{"name": "breaking", "data": "many", "what": what}], stages__0__steps=20
    )
    with pytest.raises(NonFiniteError, match=r"at step 6 \(stage 'first', step 6, objective breaking\)") as caught:
        train(table, out=tmp_path / "run")
    assert "the last good checkpoint is" in str(caught.value)
    assert "00-000000004" in str(caught.value)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["00-000000004"]
    saved = torch.load(tmp_path / "run/checkpoints/00-000000004/training.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in saved["weights"].values())
    broken.clear()
    with pytest.raises(NonFiniteError, match=r"no checkpoint had been written"):
        train(table)


def until(at_least, on_failure, **settings):
    return recipe(
        ("stages.1",),
        stages__0__until={"metric": "accuracy", "at_least": at_least, "window": 2},
        stages__0__on_failure=on_failure,
        **settings,
    )


def test_a_stage_ends_when_it_has_reached_its_goal():
    result = train(until(0.0, "stop"))
    assert result.stages[0]["steps"] == 2
    assert result.stages[0]["reached"]


def test_a_missed_goal():
    with pytest.raises(TrainingError, match=r"stage 'first' must reach accuracy 1 within 4 steps, got .* \(seed 3\)"):
        train(until(1.0, "stop"))
    result = train(until(1.0, "continue"))
    assert (result.stages[0]["steps"], result.stages[0]["reached"], result.restarts) == (4, False, 0)
    with pytest.raises(TrainingError, match=r"must reach accuracy 1 .*; restarts: 1: raise its steps, or set"):
        train(until(1.0, "restart", restarts=1))


def test_restarts_take_other_seeds_and_are_counted(tmp_path):
    probe = train(until(1.0, "continue"), settings={"restarts": 0})
    goal = probe.stages[0]["value"] + 1e-9  # what seed 3 just misses
    result = train(until(goal, "restart", restarts=40, data__one__language__relations=2), out=tmp_path / "run")
    assert result.restarts == len(result.missed) == len(result.seeds) - 1 > 0
    assert len(set(result.seeds)) == len(result.seeds)
    assert "(seed 3)" in result.missed[0]
    assert result.seconds_in_all > result.seconds
    note = json.loads((tmp_path / "run/run.json").read_text())
    assert note["seeds"] == result.seeds
    assert note["missed"] == result.missed
    assert len(note["starts"]) == 1  # of the program
    assert {record["attempt"] for record in result.records} == set(range(result.restarts + 1))


def test_groups_rates_and_norms():
    trained = {
        "mplus.retriever.key_proj.0.weight": torch.nn.Parameter(torch.zeros(2)),
        "mplus.begin": torch.nn.Parameter(torch.zeros(3)),
        "model.layers.0.weight": torch.nn.Parameter(torch.zeros(4)),
    }
    options = Optimizer(learning_rate=0.1, retriever_learning_rate=0.5, weight_decay=0.02)
    optimizer = make_optimizer(trained, options)
    rest, retriever = optimizer.param_groups
    assert [len(group["params"]) for group in (rest, retriever)] == [2, 1]
    assert (rest["lr"], retriever["lr"], rest["weight_decay"]) == (0.1, 0.5, 0.02)
    for name, scale in zip(trained, (3.0, 4.0, 0.0), strict=True):
        trained[name].grad = torch.full_like(trained[name], scale)
    norms = clip_gradients(optimizer, 1.0)
    assert norms == pytest.approx({"": 4 * 3**0.5, "retriever": 3 * 2**0.5})
    for group in (rest, retriever):  # each is clipped by its own norm
        squares = sum(float(p.grad.square().sum()) for p in group["params"])
        assert squares == pytest.approx(1.0)
    assert clip_gradients(optimizer, None) == pytest.approx({"": 1.0, "retriever": 1.0})


def test_any_module_of_a_mechanism_is_a_group_with_a_rate_of_its_own():
    names = ("mplus.side.0.weight", "mplus.gate", "model.layers.0.weight", "mplus.side.1.bias", "mplus.topic.weight")
    trained = {name: torch.nn.Parameter(torch.zeros(2)) for name in names}
    optimizer = make_optimizer(trained, Optimizer(learning_rate=0.1, learning_rates={"side": 0.01}))
    found = {group["module"]: (len(group["params"]), group["lr"]) for group in optimizer.param_groups}
    assert found == {"": (2, 0.1), "side": (2, 0.01), "topic": (1, 0.1)}
    with pytest.raises(ConfigError, match=r"learning_rates must name modules .* \('side', 'topic'\), got 'sides'"):
        make_optimizer(trained, Optimizer(learning_rates={"sides": 0.01}))
    with pytest.raises(ConfigError, match=r"one of retriever_learning_rate and learning_rates\.retriever"):
        Optimizer(retriever_learning_rate=0.1, learning_rates={"retriever": 0.2})
    with pytest.raises(ConfigError, match="learning_rates must be a table of numbers of at least 0"):
        Optimizer(learning_rates={"side": -1.0})


def test_schedules():
    def rates(**options):
        share = make_schedule(Optimizer(**options), 10)
        return [share(step, step) for step in (0, 1, 4, 5, 10, 20)]

    assert rates(schedule="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 1, 1, 1, 1])
    assert rates(schedule="linear", floor=0.2) == pytest.approx([1, 0.92, 0.68, 0.6, 0.2, 0.2])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in (0, 0.1, 0.4, 0.5, 1, 1)]
    assert rates(schedule="cosine") == pytest.approx(cosine)


def test_the_rate_falls_from_the_stage_that_is_named_whatever_the_others_took():
    shipped = read_recipe("recall-tiny").recipe
    names = [stage.name for stage in shipped.stages]
    last = shipped.stages[-1]
    assert shipped.optimizer.fall_from == last.name
    assert shipped.falling_steps == last.steps
    assert shipped.falling_steps_before(names.index("four-facts"), 50) == 0
    assert shipped.falling_steps_before(len(names) - 1, 7) == 7
    whole = evolve(shipped, optimizer=evolve(shipped.optimizer, fall_from=None))
    assert whole.falling_steps == shipped.steps
    assert whole.falling_steps_before(1, 3) == shipped.stages[0].steps + 3


def test_documents_that_are_too_short_are_counted_skipped_and_reported(tmp_path):
    lines = ["word " * count for count in (2, 60, 3, 70)]
    (tmp_path / "texts.txt").write_text("\n\n".join(lines), encoding="utf-8")
    data = {"kind": "documents", "paths": str(tmp_path / "texts.txt"), "separator": "\n\n", "shuffle": False}
    table = {**STORIES, "data": {"novel": {**data, "chunk_tokens": 8, "target_tokens": 10}}}
    objectives = [{"name": "two_chunk", "data": "novel"}]
    result = train(table, settings={"stages.0.objectives": objectives, "stages.0.steps": 12})
    assert result.stages[0]["skipped"]["novel"]["too_short"] > 2
    assert result.to_dict()["stages"][0]["skipped"]["novel"]["unused_tokens"] > 0


def test_a_new_tokenizer_comes_from_the_data_and_goes_with_the_run(tmp_path, page):
    table = recipe(
        ("data.one", "data.many", "stages.1"),
        model__tokenizer={"data": ["novel"], "vocabulary": 300, "characters": 20_000},
        data__novel={"kind": "documents", "paths": str(page), "chunk_tokens": 12, "target_tokens": 8},
        stages__0__objectives=[{"name": "single_context", "data": "novel"}],
    )
    result = train(table, out=tmp_path / "run", steps=1)
    assert len(result.tokenizer) == 300 == result.model.config.vocab_size
    assert result.tokenizer.decode(result.tokenizer("Mary said, “Yes.”")["input_ids"]) == "Mary said, “Yes.”"
    assert (tmp_path / "run/tokenizer/tokenizer.json").is_file()
    assert (tmp_path / "run/model/tokenizer.json").is_file()


def test_a_training_goes_on_from_a_saved_memory_model(run, tmp_path):
    """Sizes of memory may differ; what was trained is taken over."""
    table = recipe(
        ("model.build",),
        model__path=str(run.folder / "model"),
        optimizer__learning_rate=0.0,
        memory__short_term_tokens=9,
    )
    assert same(weights(train(table, steps=1).model), weights(run.model))
    table["memory"]["retriever"]["width"] = 16
    with pytest.raises(CheckpointError, match=r"does not fit the decoder: .*of another shape"):
        train(table, steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.path": "/nowhere/at/all", "model.tokenizer": "stories260K"},
            "path must be a decoder that transformers can load, got '/nowhere/at/all'",
        ),
        ({"model.tokenizer": "/nowhere/at/all"}, "tokenizer must be one that transformers can load, got"),
    ],
)
def test_decoders_that_are_not_there(settings, message):
    with pytest.raises(ConfigError, match=message):
        train(STORIES, settings=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.build.model_type": "lama"}, "model_type must be one that transformers knows, got 'lama'"),
        ({"model.build.hiden_size": 4}, "'hiden_size' is not a field of a llama configuration; did you mean 'hidden_s"),
        ({"model.build.hidden_size": 15}, "a llama with .* cannot be built"),
    ],
)
def test_decoders_that_cannot_be_built(settings, message):
    with pytest.raises(ConfigError, match=message):
        train(recipe(), settings=settings)


def test_ways_of_parallel_training_that_are_not_supported():
    class Fake:
        is_fsdp2 = False

        class distributed_type:  # noqa: N801
            value = "FSDP"

    with pytest.raises(NotSupported, match=r"with DDP or with FSDP2, got FSDP: set fsdp_version to 2"):
        check_accelerator(Fake)
