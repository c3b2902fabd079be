"""The retention harness of the little language: what is asked, what the arms see, what is counted."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mplus
from mplus.errors import ConfigError
from mplus.evaluation.recall.arms import (
    BM25,
    FullContext,
    MemoryArm,
    NoMemory,
    Window,
    bytes_of_long_term,
    bytes_of_short_term,
    right_answers,
)
from mplus.evaluation.recall.facts import Round, Telling, rounds, untold_round
from mplus.evaluation.recall.health import retriever_health
from mplus.evaluation.recall.retention import retention, tell
from mplus.evaluation.recall.selection import OraclePicker, RandomPicker, RecencyPicker, SelectPicker
from mplus.evaluation.recall.signals import FEATURES, signs
from mplus.evaluation.retriever_swap import with_own_parameters
from mplus.facts.language import Language
from mplus.stores.base import StoreLayout
from mplus.testing.rounding import InFloat64, check_close
from mplus.training.batch import NO_SOURCE
from mplus.training.batched.long_term import LongTermRows
from mplus.training.batched.read import DenseDecoder
from mplus.training.batched.selection import ScorePicker

pytestmark = pytest.mark.two_computations

LANGUAGE = Language(relations=5, firsts=12, lasts=12)
TELLING = Telling(language=LANGUAGE, ages=(0, 2, 9), streams=3, rounds=2, between=3, seed=4)


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
def played():
    """Streams told up to the last round, and that round."""
    episodes = TELLING.episodes()
    tellings = tell(model(), TELLING, episodes)
    for asked in rounds(TELLING, episodes):
        streams = tellings.up_to(asked.told)
    return streams, asked, episodes


def spoken(ids):
    return [LANGUAGE.vocabulary[i] for i in ids.tolist() if i]


def test_questions_are_about_what_was_told_at_each_age():
    episodes = TELLING.episodes()
    for asked, told in zip(rounds(TELLING, episodes), (10, 13), strict=True):
        assert asked.told == told
        for row, episode in enumerate(episodes):
            for place, age in enumerate(TELLING.ages):
                words = spoken(asked.texts[row, place])
                chunk = spoken(episode.chunks[told - 1 - age])
                assert " ".join(words) in " ".join(chunk)
                assert LANGUAGE.fact(" ".join(words[:4])) == asked.about[row, place]
                assert spoken(asked.texts[row, place][asked.queries[row, place]]) == words[:4]
                assert spoken(asked.texts[row, place][asked.answers[row, place]]) == words[4:]


def test_untold_facts_are_never_told():
    episodes = TELLING.episodes()
    asked = untold_round(TELLING, episodes, 10, 5, seed=0)
    for row, episode in enumerate(episodes):
        facts = {LANGUAGE.fact(" ".join(spoken(text)[:4])) for text in asked.texts[row]}
        assert not facts & set(episode.facts)
    assert bool((asked.about == NO_SOURCE).all())


def test_an_answer_is_right_when_greedy_decoding_says_it():
    streams, asked, _ = played()
    decoder = DenseDecoder(model())
    with torch.no_grad():
        read = decoder.read(streams, asked.texts, queries=asked.queries)
        said = asked.texts.clone()
        said[:, :, 4:] = 0
        for place in range(4, asked.texts.shape[2]):  # token by token, from its own words
            step = decoder.read(streams, said, queries=asked.queries).logits[:, :, place - 1].argmax(-1)
            said[:, :, place] = step
    greedy = ((said == asked.texts) | ~asked.answers)[:, :, 4:].all(2)
    assert torch.equal(right_answers(read.logits, asked), greedy)


def test_right_answers_need_every_token():
    texts = torch.tensor([[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0]]])
    answers = torch.tensor([[[False] * 4 + [True, True], [False] * 4 + [True, False]]])
    asked = Round(1, texts, ~answers, answers, texts[:, :, 0], (0, 1))
    said = torch.tensor([[[0, 0, 0, 5, 9, 0], [0, 0, 0, 5, 9, 0]]])
    assert right_answers(torch.nn.functional.one_hot(said, 10).float(), asked).tolist() == [[False, True]]


def test_the_oracle_brings_back_what_there_is_of_a_fact():
    streams, asked, _ = played()
    with torch.no_grad():
        read = DenseDecoder(model()).read(streams, asked.texts, queries=asked.queries, picker=OraclePicker(asked.about))
    for layer, seen in read.layers.items():
        have = (streams.ltm[layer].source[:, None] == asked.about[:, :, None]).sum(2)
        hit = (seen.picked_source == asked.about[:, :, None]).sum(2)
        assert torch.equal(hit, have)
    assert int(have.sum()) > 0


def test_recency_brings_back_the_newest_rows_and_random_differs_by_text():
    streams, asked, _ = played()
    with torch.no_grad():
        read = DenseDecoder(model()).read(streams, asked.texts, picker=RecencyPicker())
        drawn = DenseDecoder(model()).read(streams, asked.texts, picker=RandomPicker())
    for layer, seen in read.layers.items():
        births = streams.ltm[layer].birth[:, None].expand(-1, 3, -1).gather(2, seen.picked)
        assert torch.equal(births[:, 0], streams.ltm[layer].birth.sort(1).values[:, -6:])
    picked = drawn.layers[0].picked
    assert not torch.equal(picked[:, 0], picked[:, 1])


def test_text_arms_put_the_right_text_in_front():
    _, asked, episodes = played()
    window, can = Window(32).chosen(asked, episodes)
    assert torch.equal(window[1, 0], episodes[1].chunks[11:13].flatten())
    assert can.tolist() == [True] * 3
    full, can = FullContext(96).chosen(asked, episodes)
    assert full.shape[2] == 5 * 16, "as many chunks as fit beside a question of six tokens"
    assert can.tolist() == [True, True, False], "age 9 is not in the last five chunks"
    pytest.importorskip("bm25s")
    found, can = BM25(TELLING, 2).chosen(asked, episodes)
    for row, episode in enumerate(episodes):
        for place, age in enumerate(TELLING.ages):
            chunk = episode.chunks[12 - age]
            assert any(torch.equal(part, chunk) for part in found[row, place].split(16)), "the chunk with all its words"


def test_the_window_arm_is_the_decoder_alone_over_the_text():
    streams, asked, episodes = played()
    with torch.no_grad():
        answered = Window(32).answer(DenseDecoder(model()), streams, asked, episodes)
        prompt = torch.cat([episodes[2].chunks[11:13].flatten(), asked.texts[2, 1, :4]])
        expected = model()(input_ids=prompt[None]).logits[0, -1]
        alone = NoMemory().answer(DenseDecoder(model()), streams, asked, episodes)
        bare = model()(input_ids=asked.texts[2, 1, :4][None]).logits[0, -1]
        wide = copy.deepcopy(model()).double()
        with InFloat64():
            exact = [wide(input_ids=text[None]).logits[0, -1] for text in (prompt, asked.texts[2, 1, :4])]
    check_close(answered.first[2, 1], expected, exact[0])
    check_close(alone.first[2, 1], bare, exact[1])
    assert answered.attended == 36
    assert answered.state_bytes == 32 * 8


def test_a_report_counts_every_question_of_every_arm():
    report = retention(model(), TELLING, window_tokens=32)
    names = {arm.name for arm in report.arms}
    assert {"none", "window", "memoryllm", "mplus", "mplus-random", "mplus-recency", "mplus-oracle", "snapkv"} <= names
    memory = report.arm("mplus")
    assert [cell.age for cell in memory.cells] == [0, 2, 9]
    assert all(cell.questions == TELLING.questions == 6 for cell in memory.cells)
    assert report.arm("snapkv").status == "skipped"
    assert report.arm("window").status == "not_converged"
    assert "below 0.98" in report.arm("window").reason
    streams, *_ = played()
    assert memory.state_bytes == bytes_of_short_term(streams) + bytes_of_long_term(streams)
    assert memory.tokens_attended == 1 + 6 + 12 + 4
    assert report.arm("memoryllm").state_bytes == bytes_of_short_term(streams)
    assert report.chance == pytest.approx(
        sum(1 / LANGUAGE.values(f) for e in TELLING.episodes() for f in e.facts) / (3 * TELLING.chunks)
    )
    again = retention(model(), TELLING, window_tokens=32, arms=["mplus"])
    assert [cell.correct for cell in again.arm("mplus").cells] == [cell.correct for cell in memory.cells]


def test_an_arm_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"arms must be some of none, window, .*, got 'mplus-magic'"):
        retention(model(), TELLING, arms=["mplus-magic"])
    with pytest.raises(ConfigError, match="ages must be different numbers of chunks from 0 on, ascending"):
        Telling(ages=(4, 2))


def test_health_counts_what_is_retrieved():
    old = Telling(language=LANGUAGE, ages=(9, 12), streams=3, rounds=2, seed=4)
    found = retriever_health(model(), old, retrieved_tokens=[2, 1000])
    few, all_rows = found["by_retrieved_tokens"]["2"], found["by_retrieved_tokens"]["1000"]
    assert all_rows["trained"]["gold_recall_by_layer"] == [1.0, 1.0]
    assert all_rows["random"]["any_useful_row_by_layer"] == [1.0, 1.0]
    assert all(0 <= share < 1 for share in few["random"]["gold_recall_by_layer"])
    assert few["trained"]["questions"] == 3 * 2 * 2
    assert len(found["logit_std_by_layer"]) == 2
    assert all(spread > 0 for spread in found["logit_std_by_layer"])


def test_a_retriever_selects_from_stores_that_follow_the_streams():
    """Rows come and go in the streams, in no particular order: what is picked are the best of those that are there."""
    retriever = model().mplus_engine.mechanism.additions.retriever
    layout = StoreLayout(layers=2, hidden_size=retriever.shape.hidden_size)
    rows = LongTermRows(2, layout, capacity=9)
    picker = SelectPicker(retriever)
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
            found, values = picker.pick(1, text, queries, rows.hidden, rows, 4)
            expected, scores = ScorePicker(retriever).pick(1, text, queries, rows.hidden, rows, 4)
        torch.testing.assert_close(values, scores)
        for other, own, score in zip(*(each.flatten().tolist() for each in (found, expected, scores)), strict=True):
            tied = (scores - score).abs() <= 8 * torch.finfo().eps * scores.abs().max()
            assert other == own or int(tied.sum()) > 1


def test_another_retriever_is_an_arm():
    report = retention(
        model(), TELLING, arms=["mplus", "mplus-same"], retrievers={"same": with_own_parameters(model(), "centroid")}
    )
    same, usual = report.arm("mplus-same"), report.arm("mplus")
    assert [cell.correct for cell in same.cells] == [cell.correct for cell in usual.cells]


def test_health_compares_retrievers_with_the_exact_best():
    old = Telling(language=LANGUAGE, ages=(12,), streams=3, rounds=2, seed=4)
    indexed = with_own_parameters(model(), "faiss_ivf", least=8, cells=6, probes=1)
    found = retriever_health(model(), old, retrieved_tokens=[4], retrievers={"indexed": indexed})
    both = found["by_retrieved_tokens"]["4"]
    assert both["trained"]["overlap_with_exact_by_layer"] == [1.0, 1.0]
    assert all(0 < share < 1 for share in both["indexed"]["overlap_with_exact_by_layer"])
    assert both["indexed"]["questions"] == both["trained"]["questions"]
    assert [one["cells"] for one in both["indexed"]["index_by_layer"]] == [6, 6]


def test_signs_cover_told_and_untold_questions_alike():
    found = signs(model(), TELLING)
    assert found.features.shape == (2 * TELLING.questions * 3, len(FEATURES))
    assert bool(found.features.isfinite().all())
    assert int(found.told.sum()) == TELLING.questions * 3
    assert not bool((found.right & ~found.told).any())


def test_memory_arms_read_with_the_k0_they_are_given():
    streams, asked, episodes = played()
    arm = MemoryArm("mplus", ScorePicker(model().mplus_engine.mechanism.additions.retriever), 3)
    with torch.no_grad():
        answered = arm.answer(DenseDecoder(model()), streams, asked, episodes)
    assert answered.read.layers[0].picked.shape[2] == 3
    assert answered.attended == 1 + 3 + 12 + 4
