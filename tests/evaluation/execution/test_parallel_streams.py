"""Facts and their vectorised execution: what is asked, what the arms see, what is counted."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from attrs import evolve
from transformers import LlamaConfig, LlamaForCausalLM

import mplus
from mplus.errors import ConfigError, UnknownNameError
from mplus.evaluation.abstention import abstention
from mplus.evaluation.arms import BM25, FullContext, MemoryArm, NoMemory, Window
from mplus.evaluation.execution import GeneratedAnswers, ParallelStreams
from mplus.evaluation.execution.stream_reading import (
    OracleSelector,
    RandomSelector,
    RecencySelector,
    SelectSelector,
    StreamWay,
    right_answers,
    stream_bytes,
)
from mplus.evaluation.generating import Generation, Scoring
from mplus.evaluation.health import retriever_health
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.retriever_swap import with_own_parameters
from mplus.evaluation.tasks.facts import Facts
from mplus.facts.language import Language
from mplus.hf.pretrained.shipped import load_recall
from mplus.mechanisms.short_term.batched_prefix import ScoreSelector
from mplus.mechanisms.short_term.long_term_rows import LongTermRows
from mplus.stores.base import StoreLayout
from mplus.testing.rounding import InFloat64, check_close
from mplus.training.decoder import TrainedDecoder

pytestmark = pytest.mark.two_computations

LANGUAGE = Language(relations=5, firsts=12, lasts=12)
FACTS = Facts(language=LANGUAGE, ages=(0, 2, 9), streams=3, rounds=2, between=3, seed=4)


@functools.cache
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LANGUAGE.vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
    )
    memory = mplus.MPlusConfig(
        chunk_tokens=16,
        min_chunk_tokens=4,
        memory_tokens_per_chunk=4,
        short_term_tokens=12,
        retrieved_tokens=6,
        long_term_tokens=100,
        retriever={"name": "linear", "width": 8},
        adapters=None,
    )
    return mplus.wrap(LlamaForCausalLM(config), memory, check=False).eval()


@functools.cache
def streams():
    return ParallelStreams(model(), FACTS)


@functools.cache
def last_moment():
    """The streams when all was told, and what is asked then."""
    *_, last = streams().moments()
    return last


def spoken(ids):
    return [LANGUAGE.vocabulary[i] for i in ids.tolist() if i]


def test_questions_are_about_what_was_told_at_each_age():
    for moment, told in zip(streams().moments(), (10, 13), strict=True):
        assert {one.told for one in moment.due} == {told}
        assert [(one.row, one.age) for one in moment.due] == [(row, age) for row in range(3) for age in FACTS.ages]
        for row, stream in enumerate(FACTS.told):
            for place, age in enumerate(FACTS.ages):
                words = spoken(moment.texts[row, place])
                assert " ".join(words) in " ".join(spoken(stream.chunks[told - 1 - age]))
                assert moment.about[row, place] == told - 1 - age
                assert spoken(moment.texts[row, place][moment.queries[row, place]]) == words[:4]
                assert spoken(moment.texts[row, place][moment.answers[row, place]]) == words[4:]


def test_passages_are_the_chunks_as_words():
    for episode, stream in zip(FACTS.episodes(), FACTS.told, strict=True):
        assert [FACTS.ids(passage.text) for passage in episode.passages] == stream.chunks.tolist()
        assert len({passage.source for passage in episode.passages}) == FACTS.passages == 13


def test_untold_facts_are_never_told():
    for episode, stream in zip(evolve(FACTS, untold_seed=0).episodes(), FACTS.told, strict=True):
        untold = [question for question in episode.questions if not question.told]
        assert [question.after for question in untold] == [9, 9, 9, 12, 12, 12]
        assert not {LANGUAGE.fact(question.prompt) for question in untold} & set(stream.facts)
    assert all(question.told for episode in FACTS.episodes() for question in episode.questions)


def test_it_counts_what_generating_counts():
    """The decoder that comes with mplus, as dense streams in one pass, and with memories and generated answers."""
    decoder, tokenizer = load_recall()
    task = Facts(ages=(0, 6, 30), streams=4, rounds=2, seed=5)
    settings = {
        "options": RunOptions(streams=3, seed=task.seed, separator=" "),
        "generation": Generation(tokens=1),
        "scoring": Scoring(correct="exact"),
    }
    names = ("none", "window", "memoryllm", "mplus", "mplus-recency", "mplus-oracle", "bm25")
    dense, generated = (
        retention(execution, ArmOptions(arms=names, window_tokens=64))
        for execution in (ParallelStreams(decoder, task), GeneratedAnswers(decoder, tokenizer, task, **settings))
    )
    assert dense.age_tokens == generated.age_tokens
    for one, other in zip(dense.arms, generated.arms, strict=True):
        assert [(cell.age, cell.questions) for cell in other.cells] == [(0, 8), (6, 8), (30, 8)]
        assert one.tokens_attended == other.tokens_attended, one.name
        if one.name not in {"mplus-oracle", "bm25"}:  # beyond what is wanted they draw at random, and differ in ties
            assert [cell.correct for cell in one.cells] == [cell.correct for cell in other.cells], one.name
    assert dense.arm("mplus").at(30).correct > dense.arm("memoryllm").at(30).correct


def test_an_answer_is_right_when_greedy_decoding_says_it():
    moment = last_moment()
    streams, asked = moment.memory, moment
    decoder = TrainedDecoder(model())
    with torch.no_grad():
        read = decoder.read(streams, asked.texts, queries=asked.queries)
        said = asked.texts.clone()
        said[:, :, 4:] = 0
        for place in range(4, asked.texts.shape[2]):  # token by token, from its own words
            step = decoder.read(streams, said, queries=asked.queries).logits[:, :, place - 1].argmax(-1)
            said[:, :, place] = step
    greedy = ((said == asked.texts) | ~asked.answers)[:, :, 4:].all(2)
    assert torch.equal(asked.right(read.logits), greedy)


def test_right_answers_need_every_token():
    texts = torch.tensor([[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0]]])
    answers = torch.tensor([[[False] * 4 + [True, True], [False] * 4 + [True, False]]])
    said = torch.tensor([[[0, 0, 0, 5, 9, 0], [0, 0, 0, 5, 9, 0]]])
    assert right_answers(torch.nn.functional.one_hot(said, 10).float(), texts, answers).tolist() == [[False, True]]


def test_the_oracle_brings_back_what_there_is_of_a_fact():
    moment = last_moment()
    streams, asked = moment.memory, moment
    with torch.no_grad():
        read = TrainedDecoder(model()).read(
            streams, asked.texts, queries=asked.queries, selector=OracleSelector(asked.about)
        )
    for layer, seen in read.layers.items():
        have = (streams.ltm[layer].source[:, None] == asked.about[:, :, None]).sum(2)
        hit = (seen.selected_source == asked.about[:, :, None]).sum(2)
        assert torch.equal(hit, have)
    assert int(have.sum()) > 0


def test_recency_brings_back_the_newest_rows_and_random_differs_by_text():
    moment = last_moment()
    streams, asked = moment.memory, moment
    with torch.no_grad():
        read = TrainedDecoder(model()).read(streams, asked.texts, selector=RecencySelector())
        drawn = TrainedDecoder(model()).read(streams, asked.texts, selector=RandomSelector())
    for layer, seen in read.layers.items():
        births = streams.ltm[layer].birth[:, None].expand(-1, 3, -1).gather(2, seen.selected)
        assert torch.equal(births[:, 0], streams.ltm[layer].birth.sort(1).values[:, -6:])
    picked = drawn.layers[0].selected
    assert not torch.equal(picked[:, 0], picked[:, 1])


def test_text_arms_put_the_right_text_in_front():
    due, told = last_moment().due, [stream.chunks for stream in FACTS.told]
    first = [one for one in due if one.row == 1]  # ages 0, 2 and 9
    assert Window(streams(), 32).context(first[0]) == told[1][11:13].flatten().tolist()
    full = [FullContext(streams(), 96).context(one) for one in first]
    assert full[0] == full[1] == told[1][8:13].flatten().tolist(), "as many as fit beside question and answer"
    assert full[2] is None, "age 9 is not in the last five chunks"
    pytest.importorskip("bm25s")
    arm = BM25(streams(), 2)
    for one in due:
        chunk = told[one.row][12 - one.age].tolist()
        found = arm.context(one)
        assert chunk in (found[:16], found[16:]), "the chunk with all its words"


def test_the_window_arm_is_the_decoder_alone_over_the_text(monkeypatch):
    moment, seen = last_moment(), []
    plain = TrainedDecoder.plain
    monkeypatch.setattr(TrainedDecoder, "plain", lambda self, ids: seen.append(plain(self, ids)) or seen[-1])
    execution = ParallelStreams(model(), FACTS)
    with torch.no_grad():
        answers = Window(execution, 32).answers(moment, moment.due)
        alone = NoMemory(execution).answers(moment, moment.due)
        question = moment.texts[2, 1, :4]
        prompt = torch.cat([FACTS.told[2].chunks[11:13].flatten(), question])
        expected = [model()(input_ids=text[None]).logits[0, -1] for text in (prompt, question)]
        wide = copy.deepcopy(model()).double()
        with InFloat64():
            exact = [wide(input_ids=text[None]).logits[0, -1] for text in (prompt, question)]
    place = 2 * len(FACTS.ages) + 1
    check_close(seen[0][place, 35], expected[0], exact[0])
    check_close(seen[1][place, 3], expected[1], exact[1])
    assert {(one.tokens_attended, one.state_bytes) for one in answers} == {(36, 32 * 8)}
    assert {(one.tokens_attended, one.state_bytes) for one in alone} == {(4, 0)}


def test_a_report_counts_every_question_of_every_arm():
    report = retention(streams(), ArmOptions(window_tokens=32))
    names = {arm.name for arm in report.arms}
    assert {"none", "window", "memoryllm", "mplus", "mplus-random", "mplus-recency", "mplus-oracle", "snapkv"} <= names
    memory = report.arm("mplus")
    assert [cell.age for cell in memory.cells] == [0, 2, 9]
    assert all(cell.questions == FACTS.questions == 6 for cell in memory.cells)
    assert report.arm("snapkv").status == "skipped"
    assert report.arm("window").status == "not_converged"
    assert "below 0.98" in report.arm("window").reason
    held = last_moment().memory
    assert memory.state_bytes == stream_bytes(held, long_term=True)
    assert memory.tokens_attended == 1 + 6 + 12 + 4
    assert report.arm("memoryllm").state_bytes == stream_bytes(held, long_term=False)
    assert report.chance == pytest.approx(
        sum(1 / LANGUAGE.values(f) for told in FACTS.told for f in told.facts) / (3 * FACTS.passages)
    )
    again = retention(streams(), ArmOptions(window_tokens=32, arms=["mplus"]))
    assert [cell.correct for cell in again.arm("mplus").cells] == [cell.correct for cell in memory.cells]


def test_an_arm_that_does_not_exist_is_refused():
    with pytest.raises(UnknownNameError, match=r"an arm must be one of none, window, .*, got 'mplus-magic'"):
        retention(streams(), ArmOptions(arms=["mplus-magic"]))
    with pytest.raises(ConfigError, match="ages must be different numbers of chunks from 0 on, ascending"):
        Facts(ages=(4, 2))


def test_health_counts_what_is_retrieved():
    old = Facts(language=LANGUAGE, ages=(9, 12), streams=3, rounds=2, seed=4)
    found = retriever_health(ParallelStreams(model(), old), retrieved_tokens=[2, 1000])
    few, all_rows = found["by_retrieved_tokens"]["2"], found["by_retrieved_tokens"]["1000"]
    assert all_rows["trained"]["gold_recall_by_layer"] == [1.0, 1.0]
    assert all_rows["random"]["any_useful_row_by_layer"] == [1.0, 1.0]
    assert all(0 <= share < 1 for share in few["random"]["gold_recall_by_layer"])
    assert few["trained"]["questions"] == 3 * 2 * 2
    assert len(found["logit_std_by_layer"]) == 2
    assert all(spread > 0 for spread in found["logit_std_by_layer"])


def test_a_retriever_selects_from_stores_that_follow_the_streams():
    """Rows come and go in the streams, in no particular order: what is picked are the best of those that are there."""
    retriever = model().mplus_engine.mechanism.retriever
    layout = StoreLayout(layers=2, hidden_size=retriever.shape.hidden_size)
    rows = LongTermRows(2, layout, capacity=9)
    selector = SelectSelector(retriever)
    generator = torch.Generator().manual_seed(0)
    births = torch.stack([torch.randperm(40, generator=generator) for _ in range(2)])
    for turn in range(8):
        place = slice(5 * turn, 5 * turn + 5)
        hidden = torch.randn(2, 5, layout.hidden_size, generator=generator)
        rows.append(hidden, births[:, place] + 100, births[:, place])
        text = torch.randn(2, 3, 4, layout.hidden_size, generator=generator)
        queries = torch.rand(2, 3, 4, generator=generator) < 0.7
        queries[..., 0] = True
        with torch.no_grad():
            found, values = selector.select(1, text, queries, rows.hidden, rows, 4)
            expected, scores = ScoreSelector(retriever).select(1, text, queries, rows.hidden, rows, 4)
        torch.testing.assert_close(values, scores)
        for other, own, score in zip(*(each.flatten().tolist() for each in (found, expected, scores)), strict=True):
            tied = (scores - score).abs() <= 8 * torch.finfo().eps * scores.abs().max()
            assert other == own or int(tied.sum()) > 1


def test_another_retriever_is_an_arm():
    execution = ParallelStreams(model(), FACTS, retrievers={"same": with_own_parameters(model(), "centroid")})
    report = retention(execution, ArmOptions(arms=["mplus", "mplus-same"]))
    same, usual = report.arm("mplus-same"), report.arm("mplus")
    assert [cell.correct for cell in same.cells] == [cell.correct for cell in usual.cells]


def test_health_compares_retrievers_with_the_exact_best():
    old = Facts(language=LANGUAGE, ages=(12,), streams=3, rounds=2, seed=4)
    indexed = with_own_parameters(model(), "faiss_ivf", least=8, cells=6, probes=1)
    found = retriever_health(ParallelStreams(model(), old), retrieved_tokens=[4], retrievers={"indexed": indexed})
    both = found["by_retrieved_tokens"]["4"]
    assert both["trained"]["overlap_with_exact_by_layer"] == [1.0, 1.0]
    assert all(0 < share < 1 for share in both["indexed"]["overlap_with_exact_by_layer"])
    assert both["indexed"]["questions"] == both["trained"]["questions"]
    assert [one["cells"] for one in both["indexed"]["index_by_layer"]] == [6, 6]


def test_signs_cover_told_and_untold_questions_alike():
    found = list(streams().signals())
    assert len(found) == 8, "two rounds, of streams that calibrate and of others, told and untold"
    for part in found:
        assert part.features.shape == (9, len(ParallelStreams.features))
        assert bool(part.features.isfinite().all())
        assert part.told.unique().numel() == 1
    judged = torch.cat([part.told[~part.calibrates] for part in found])
    assert int(judged.sum()) == FACTS.questions * 3 == len(judged) / 2
    report = abstention(streams())
    assert set(report["features"]) == set(ParallelStreams.features)
    assert report["calibrated_on"] == report["judged_on"] == {"told": 18, "not_told": 18}
    assert 0 <= report["said_unknown"]["of_told"] <= 1


def test_memory_arms_attend_to_the_rows_of_k0():
    moment = last_moment()
    arm = MemoryArm(streams(), "mplus", StreamWay(ScoreSelector(model().mplus_engine.mechanism.retriever)))
    with torch.no_grad():
        answers = arm.answers(moment, moment.due)
    assert {one.tokens_attended for one in answers} == {1 + 6 + 12 + 4}
