"""Evaluations of mechanisms that are not M+: one that chooses once for a whole text, and some with no retriever."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import NotSupported
from mplus.evaluation.abstention import abstention
from mplus.evaluation.execution import GeneratedAnswers
from mplus.evaluation.generating import Generation
from mplus.evaluation.harm import HarmOptions, harm
from mplus.evaluation.health import retriever_health
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.oracle import OracleMechanism
from mplus.evaluation.retention import retention
from mplus.evaluation.retriever_swap import retriever_for, usable
from mplus.evaluation.tasks.key_value import KeyValue
from mplus.evaluation.texts import Texts
from mplus.evaluation.tracing import FEATURES, TracingMechanism, count_rows
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.hf.reading.override import reading_as
from mplus.mechanisms import MECHANISMS
from tests.evaluation import data
from tests.evaluation.bench import CHUNK, SmallTokenizer, execution
from tests.helpers.docstrings import run_examples
from tests.mechanisms.gists import GistMechanism
from tests.mechanisms.kv.memories import EVERY
from tests.memory.tiny import SIZES, ids

PASSAGE = 8
"""Tokens of a passage: three pairs of two words, and two line breaks."""


class NewestMechanism(GistMechanism):
    """Brings the newest ``retrieved_tokens`` rows of its store back, layer by layer, without a retriever."""

    name = "newest"

    def retrieve(self, layer, hidden, mask, views):
        found = []
        for view in views:
            kept = view.store.ids(layer)[-self.config.retrieved_tokens :]
            found.append(self.bring_back(view.store, layer, kept, torch.empty(0)) if len(kept) else None)
        return found


class WindowMechanism(GistMechanism):
    """Has the name of an arm that needs no memory."""

    name = "window"


@pytest.fixture(scope="module", autouse=True)
def registered():
    for mechanism in (GistMechanism, NewestMechanism, WindowMechanism):
        MECHANISMS.register(mechanism.name, mechanism)
    yield
    for mechanism in (GistMechanism, NewestMechanism, WindowMechanism):
        MECHANISMS.unregister(mechanism.name)


@pytest.fixture(scope="module")
def kv():
    """Brings back at most three passages."""
    sizes = {"chunk_tokens": CHUNK, "min_chunk_tokens": 1, "retrieved_tokens": 3 * PASSAGE}
    every = {"name": "kv", **EVERY}  # whether or not a chunk has to do with the prompt
    return mplus.wrap(BY_NAME["llama"].build(0), {"mechanism": every, **sizes}, check=False).eval()


def foreign(name):
    sizes = {**SIZES, "memory_rows": "hidden", "adapters": None, "mechanism": name}
    return mplus.wrap(BY_NAME["llama"].build(0), mplus.MPlusConfig.from_dict(sizes), check=False).eval()


@pytest.fixture(scope="module")
def gists(registered):
    return foreign("gists")


@pytest.fixture
def protocol(tmp_path):
    """Four episodes of nine passages of three pairs; one question told, one not."""
    path = data.key_value(tmp_path / "kv.jsonl.gz", records=12)
    settings = {"passages": 9, "episodes": 4, "passage_tokens": CHUNK, "pairs": 3, "untold": 1, "prompt": "{key} is"}
    return KeyValue(KeyValue.Options(data=path, **settings), Texts(SmallTokenizer()))


def table(protocol, decoder, *ages):
    return execution(protocol, decoder, RunOptions(ages=ages), tokens=1)


def sources(model, prompts, memory, **changes):
    """Return by stream and layer the sources of the rows, or chunks, that a generation brought back."""
    with torch.no_grad(), reading_as(model, **changes):
        output = model.generate(
            input_ids=torch.stack(prompts),
            memory=memory,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_sources=True,
        )
    return [[[row.source for row in layer] for layer in stream] for stream in output.memory_sources]


def told(model, streams=2):
    memory = model.new_memory(batch_size=streams, seed=3)
    for place in range(6):
        memory.write([ids(PASSAGE, 10 * row + place) for row in range(streams)], source=f"s{place}")
    return memory


def test_a_generation_says_what_a_mechanism_brought_back_that_chooses_once(kv):
    memory = told(kv)
    # Each prompt is a part of one chunk, which BM25 then ranks first.
    found = sources(kv, [ids(PASSAGE, 1)[:4], ids(PASSAGE, 14)[:4]], memory, retrieved_tokens=PASSAGE)
    assert found == [[["s1"]] * 3, [["s4"]] * 3]  # a chunk each, in every layer
    assert sources(kv, [ids(4)] * 2, kv.new_memory(2)) == [[], []]


def test_the_oracle_lets_it_choose_among_what_was_wanted_and_others_up_to_their_number(kv):
    memory = told(kv)
    prompts = [ids(PASSAGE, 1)[:4], ids(PASSAGE, 14)[:4]]
    oracle = partial(OracleMechanism, wanted=[{"s0"}, {"s2", "s5"}])
    for layers, wanted in zip(sources(kv, prompts, memory, around=oracle), ({"s0"}, {"s2", "s5"}), strict=True):
        assert layers[0] == layers[1] == layers[2]
        assert wanted < set(layers[0])
        assert len(layers[0]) == 3
    alone = sources(kv, prompts, memory, around=oracle, retrieved_tokens=PASSAGE)
    assert set(alone[0][0]) == {"s0"}
    assert set(alone[1][0]) < {"s2", "s5"}
    assert [[source.name for source in state.sources] for state in memory.states] == [[f"s{n}" for n in range(6)]] * 2


def test_what_it_brings_back_is_traced(kv):
    memory, seen = told(kv), {}
    prompts = [ids(PASSAGE, 1)[:4], ids(PASSAGE, 14)[:4]]
    sources(kv, prompts, memory, around=partial(TracingMechanism, seen=seen), retrieved_tokens=PASSAGE)
    assert sorted(seen) == [0, 1, 2]
    for layer, one in seen.items():
        counts = [count_rows(layer, one, row, {"s1"}) for row in range(2)]
        assert [(rows.stored, rows.useful, rows.retrieved) for rows in counts] == [(6 * PASSAGE, PASSAGE, PASSAGE)] * 2
        assert [rows.useful_retrieved for rows in counts] == [PASSAGE, 0]
        assert [rows.useful_short_term for rows in counts] == [0, 0]


def test_health_of_a_mechanism_that_chooses_once(kv, protocol):
    report = retriever_health(table(protocol, kv, 0, 8), retrieved_tokens=[PASSAGE - 1, PASSAGE, 9 * PASSAGE])
    assert report["score_std_by_layer"] == [None] * 3
    by_k = {k: found["own"] for k, found in report["by_retrieved_tokens"].items()}
    assert all(list(found) == ["own"] for found in report["by_retrieved_tokens"].values())
    assert by_k["7"]["gold_recall_by_layer"] == [0.0] * 3  # no chunk fits
    assert by_k["72"]["gold_recall_by_layer"] == [1.0] * 3
    assert by_k["72"]["share_of_rows_retrieved_by_layer"] == [1.0] * 3
    assert (by_k["72"]["questions_with_hit"], by_k["7"]["questions_without_hit"]) == (8, 8)
    # One passage of one or of nine fits: that the key was told in is the best one, or was told alone.
    assert by_k["8"]["gold_recall_by_layer"][0] >= 0.5
    with pytest.raises(NotSupported, match="'kv' has no retriever that another one could stand in for"):
        retriever_for(kv, "random")
    assert usable(kv) == {}


def test_signs_of_a_mechanism_without_a_retriever(kv, gists, protocol):
    for decoder in (kv, gists):
        report = abstention(table(protocol, decoder, 0, 8))
        assert list(report["features"]) == list(FEATURES[:3])  # nothing is scored, and no attention weights are kept
        assert report["judged_on"] == {"told": 4, "not_told": 4}


def test_rows_that_are_brought_back_without_a_retriever_are_traced(protocol):
    decoder = foreign("newest")
    report = retriever_health(table(protocol, decoder, 0, 8), retrieved_tokens=[2, 6])
    for k in (2, 6):
        found = report["by_retrieved_tokens"][str(k)]["own"]
        # At age 8 the first of nine means is asked for; six are stored, the others beside the store.
        assert found["gold_recall_by_layer"] == [1.0 if k == 6 else 0.0] * 3
        assert found["any_useful_row_by_layer"] == [1.0 if k == 6 else 0.0] * 3
    memory = told(decoder)
    oracle = partial(OracleMechanism, wanted=[{"s0"}, {"s1"}])
    found = sources(decoder, [ids(4)] * 2, memory, around=oracle, retrieved_tokens=1)
    assert found == [[["s0"]] * 3, [["s1"]] * 3]


def test_a_mechanism_that_brings_nothing_back_is_refused_by_name(gists, protocol):
    with pytest.raises(NotSupported, match="mechanism is 'gists', whose reads bring no rows back"):
        retriever_health(table(protocol, gists, 0))


def test_arms_of_their_own(kv, gists, protocol):
    report = retention(table(protocol, kv, 0, 8), ArmOptions(arms=("none", "kv", "kv-oracle")), progress=False)
    assert [(arm.name, arm.status) for arm in report.arms] == [("none", "ok"), ("kv", "ok"), ("kv-oracle", "ok")]
    own, oracle = report.arm("kv"), report.arm("kv-oracle")
    assert own.at(8).state_bytes == oracle.at(8).state_bytes
    with pytest.raises(NotSupported, match=r"none, window, full-context, snapkv, bm25, ceiling, gists$"):
        table(protocol, gists, 0).arm_options(ArmOptions(arms=("mplus",)))
    assert retention(table(protocol, gists, 0), ArmOptions(arms=("gists",)), progress=False).arm("gists").cells


def test_a_mechanism_called_like_another_arm_is_refused(protocol):
    with pytest.raises(NotSupported, match="'window' has the name of an arm that there is for every decoder"):
        table(protocol, foreign("window"), 0).arm_options(ArmOptions())


def test_harm_of_each(kv, gists):
    held_out, unrelated = (" ".join(f"word{number}" for number in range(*span)) for span in ((70,), (80, 300)))
    options = HarmOptions(text_tokens=12, known_tokens=4, pieces=3, batch=2, unrelated_tokens=96)
    for decoder, rows in ((kv, {"long_term": [96] * 3}), (gists, {"gist": [3] * 3, "long_term": [3] * 3})):
        report = harm(decoder, SmallTokenizer(), held_out, unrelated, options=options, progress=False)
        assert report["nats_per_token"]["empty"] == report["nats_per_token"]["none"]
        assert report["nats_per_token"]["unrelated"] != report["nats_per_token"]["none"]
        assert report["memory_rows_by_layer"] == rows


@pytest.mark.parametrize("thing", [OracleMechanism, TracingMechanism])
def test_examples(kv, thing):
    names = vars(importlib.import_module(thing.__module__))
    run_examples(thing, **{**names, "model": kv, "prompt": ids(PASSAGE, 1)[None, :4], "memory": told(kv, 1)})


def test_a_memory_of_text_is_an_arm_and_has_signs(tmp_path):
    decoder, tokenizer = mplus.wrap(load_decoder(), {"mechanism": "notes", "chunk_tokens": 64}), load_tokenizer()
    path = data.key_value(tmp_path / "kv.jsonl.gz", records=12)
    options = {"passages": 3, "episodes": 2, "passage_tokens": 64, "pairs": 2, "untold": 1, "prompt": "{key} is"}
    task = KeyValue(KeyValue.Options(data=path, **options), Texts(tokenizer))
    asked = GeneratedAnswers(
        decoder, tokenizer, task, options=RunOptions(ages=(0, 2)), generation=Generation(tokens=3, batch=1)
    )
    report = retention(asked, ArmOptions(arms=("none", "window", "notes")), progress=False)
    assert {arm.name: arm.status for arm in report.arms} == {"none": "ok", "window": "not_converged", "notes": "ok"}
    assert report.arm("notes").at(2).questions == 2
    assert report.arm("notes").state_bytes > 0
    # Notes stand in front of the prompt, as text.
    assert report.arm("none").tokens_attended < report.arm("notes").tokens_attended
    *_, moment = asked.moments()
    due = [one for one in moment.due if one.question.told][:1]
    [found] = asked.read(moment, due, asked.way("notes", ArmOptions()))
    prompt = torch.tensor([asked.question(due[0])])
    with torch.no_grad():
        made = decoder.generate(prompt, memory=moment.memory.select([due[0].row]), max_new_tokens=3, do_sample=False)
        alone = decoder.generate(prompt, max_new_tokens=3, do_sample=False)
    assert list(found.generated.ids) == made[0, prompt.shape[1] :].tolist() != alone[0, prompt.shape[1] :].tolist()
    assert list(abstention(asked)["features"]) == list(FEATURES[:3])
    with pytest.raises(NotSupported, match="'notes', whose reads bring no rows back"):
        retriever_health(asked)
