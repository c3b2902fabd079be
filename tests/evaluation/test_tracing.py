"""Watching reads changes nothing and counts rightly; abstention and retriever health on a tiny decoder."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import ConfigError, InputError, NotSupported
from mplus.evaluation.abstention import abstention
from mplus.evaluation.execution.base import Due, RowCounts, Trace
from mplus.evaluation.generating import Generation, answers
from mplus.evaluation.health import HitCount, retriever_health
from mplus.evaluation.options import RunOptions
from mplus.evaluation.tasks.key_value import KeyValue
from mplus.evaluation.texts import Texts
from mplus.evaluation.tracing import FEATURES, TracingMechanism, attention_mass, count_rows, features, scores
from mplus.hf.reading.override import reading_as
from tests.evaluation import data
from tests.evaluation.bench import CHUNK, SmallTokenizer, execution, model
from tests.memory.tiny import K0, SIZES, build, prompts, written

pytestmark = pytest.mark.two_computations

GENERATION = Generation(tokens=1)


def protocol(tmp_path, **changes):
    path = data.key_value(tmp_path / "kv.jsonl.gz", records=12)
    settings = {"passages": 9, "episodes": 4, "passage_tokens": CHUNK, "pairs": 3, "untold": 1, "prompt": "{key} is"}
    return KeyValue(KeyValue.Options(data=path, **{**settings, **changes}), Texts(SmallTokenizer()))


@pytest.mark.parametrize("name", ["paper", "published"])
def test_what_is_seen(name):
    memory = written(name, [200, 150])
    decoder, seen = memory.engine.model, {}
    usual = answers(decoder, SmallTokenizer(), prompts(2).tolist(), GENERATION, memory)
    with reading_as(decoder, around=partial(TracingMechanism, seen=seen)):
        watched = answers(decoder, SmallTokenizer(), prompts(2).tolist(), GENERATION, memory)
    assert [one.ids for one in usual] == [one.ids for one in watched]
    assert sorted(seen) == [0, 1, 2]
    for layer, one in seen.items():
        for row in range(2):
            everything = count_rows(layer, one, row, {"first", "zweite Quelle"})
            view = memory.snapshot()[row]
            waiting = len(view.state.pending[layer])
            assert everything.stored == everything.useful == view.store.count(layer) + waiting
            assert everything.retrieved == everything.useful_retrieved == K0
            assert everything.useful_short_term == len(view.state.stm[layer])
            first = count_rows(layer, one, row, {"first"})
            assert 0 < first.useful < first.stored
            # The rows that came back are the best of all scores.
            every = scores(memory.engine, layer, one, row, short_term=False)
            assert len(every) == everything.stored
            found = one.found[row]
            assert found.scores.sort().values == pytest.approx(every.sort().values[-K0:], abs=1e-5)
            both = scores(memory.engine, layer, one, row)
            assert len(both) == everything.stored + everything.useful_short_term
            assert torch.allclose(both[: len(every)], every, atol=1e-6)


def test_counting():
    count = HitCount(2)
    hit = {"stored": 10, "useful": 4, "retrieved": 5, "useful_retrieved": 2, "useful_short_term": 0}
    miss = {**hit, "useful_retrieved": 0}
    held = {**miss, "useful": 2, "useful_short_term": 2}  # the STM may have answered: not counted by hit

    def add(*asked):
        """Each question: its rows in the first and the second layer, and whether it was answered right."""
        layers = [
            RowCounts(**{name: torch.tensor([one[layer][name] for one in asked]) for name in hit}) for layer in (0, 1)
        ]
        count.add(Trace(layers, torch.tensor([one[2] for one in asked], dtype=torch.bool)))

    add((hit, miss, True), (miss, miss, False))
    add()
    add((held, miss, True), (miss, miss, True))
    assert count.plain() == {
        "questions": 4,
        "accuracy": 0.75,
        "gold_recall_by_layer": [round(2 / 14, 4), 0.0],
        "share_of_rows_retrieved_by_layer": [0.5, 0.5],
        "any_useful_row_by_layer": [0.25, 0.0],
        "accuracy_with_hit": 1.0,
        "accuracy_without_hit": 0.5,
        "questions_with_hit": 1,
        "questions_without_hit": 2,
    }
    assert HitCount(1).plain()["accuracy"] is None


def test_health(tmp_path):
    options = RunOptions(ages=(8,))
    report = retriever_health(execution(protocol(tmp_path), options=options, tokens=1))
    assert report["trained_with"] == K0
    assert list(report["by_retrieved_tokens"]) == ["1", "3", "6", "12", "24"]
    for k, both in report["by_retrieved_tokens"].items():
        for one in both.values():
            assert one["questions"] == 4
            for share, retrieved in zip(one["share_of_rows_retrieved_by_layer"], [int(k)] * 3, strict=True):
                assert share == pytest.approx(min(retrieved / 24, 1), abs=1e-4)  # 36 rows written, 12 in the STM
    everything = report["by_retrieved_tokens"]["24"]
    assert everything["own"]["gold_recall_by_layer"] == [1.0] * 3
    assert all(spread > 0 for spread in report["score_std_by_layer"])
    with pytest.raises(ConfigError, match=r"at least 1, got \[0\]"):
        retriever_health(execution(protocol(tmp_path)), retrieved_tokens=[0])
    with pytest.raises(NotSupported, match="the decoder's mechanism is 'memoryllm', whose reads bring no rows back"):
        retriever_health(execution(protocol(tmp_path), build(mechanism="memoryllm")))
    with pytest.raises(NotSupported, match="'mplus' without long-term memory"):
        retriever_health(execution(protocol(tmp_path), build(long_term_tokens=0)))


def test_abstention(tmp_path):
    report = abstention(execution(protocol(tmp_path), options=RunOptions(ages=(0, 8)), tokens=1))
    assert list(report["features"]) == list(FEATURES[:-1])  # no attention weights in this decoder
    assert report["calibrated_on"] == report["judged_on"] == {"told": 4, "not_told": 4}
    assert 0 <= report["combined"]["auroc"] <= 1
    assert set(report["combined"]["weights"]) == set(report["features"])
    with pytest.raises(InputError, match="got untold = 0 and 4 episodes"):
        abstention(execution(protocol(tmp_path, untold=0)))


def test_features_by_hand(tmp_path):
    table = execution(protocol(tmp_path, episodes=1), options=RunOptions(ages=(8,)), tokens=1)
    [moment] = table.moments()
    prompts_ = [table.texts.ids(one.question.prompt) for one in moment.due]
    memory, ids = moment.memory, prompts_[0]
    found = features(model(), table.tokenizer, prompts_, memory.select([0, 0]), table.generation)
    assert found.shape == (2, len(FEATURES))
    with torch.no_grad():
        first = model()(input_ids=torch.tensor([ids]), memory=memory.select([0])).logits[0, -1].softmax(-1)
    assert float(found[0, 1]) == pytest.approx(float(first.max()), rel=1e-4)
    assert float(found[0, 2]) == pytest.approx(float(first.max().log()), rel=1e-3)
    assert float(found[0, 3]) >= float(found[0, 4])
    assert bool(found[:, 6].isnan().all())


def test_attention_mass():
    import mplus

    decoder = BY_NAME["llama"].build(0)
    decoder.set_attn_implementation("eager")
    mplus.wrap(decoder, mplus.MPlusConfig.from_dict(SIZES), check=False)
    decoder.eval()
    memory = decoder.new_memory()
    with torch.no_grad():
        [nothing] = attention_mass(decoder, [[5, 6, 7]], memory)
        memory.write(list(range(2, 98)), progress=False)
        [much] = attention_mass(decoder, [[5, 6, 7]], memory)
    assert nothing == 0
    assert 0 < much < 1
    with torch.no_grad():
        weights = decoder(input_ids=torch.tensor([[5, 6, 7]]), memory=memory, output_attentions=True).attentions
    by_hand = torch.stack([1 - layer[0, :, -1, [0, -3, -2, -1]].sum(-1) for layer in weights]).mean()
    assert much == pytest.approx(float(by_hand), abs=1e-5)


def test_due_of_an_untold_question_has_no_sources(tmp_path):
    [episode] = protocol(tmp_path).episodes()[:1]
    assert Due(episode, 0, 1, 0).sources() == set()
