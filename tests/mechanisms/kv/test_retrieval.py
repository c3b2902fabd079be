"""Which of the chunks that were scored come back, the newer or the likelier; and what a memory knows of its decoder."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from attrs import evolve

import mplus
from mplus.download import cache_folder
from mplus.errors import CheckpointError, ConfigError
from mplus.mechanisms.kv.asked import Asked, ChosenChunks
from mplus.mechanisms.kv.front import rows_of
from mplus.mechanisms.kv.passes import values_in
from mplus.mechanisms.kv.ranking import answering, likelihoods, ranked, written_later
from mplus.mechanisms.kv.retrieval import Retrieval, _parts
from mplus.mechanisms.kv.state import state_of
from mplus.retrievers.chunks import CHUNK_RETRIEVERS, ChunkRetriever, Chunks, Query
from mplus.testing.chunk_retrievers import SmallTokenizer
from tests.mechanisms.kv.memories import BOS, BY_NAME, RETRIEVED, text, wrapped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor


class Given(ChunkRetriever):
    """Scores chunks as it is told to."""

    name = "given"
    near = 1.0
    told: ClassVar[list[float]] = []

    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        return torch.tensor(self.told[: len(chunks)], dtype=torch.float64)

    def threshold(self, chunks: Chunks) -> float:
        return 2.0


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    CHUNK_RETRIEVERS.register("given", Given)
    yield wrapped(retriever="given")
    CHUNK_RETRIEVERS.unregister("given")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPLUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibrations"


def set_options(model: Any, **options: Any) -> None:
    """Let an equal mechanism with other options stand in: wrapping a decoder takes a second."""
    engine, usual = (
        model.mplus_engine,
        {"order": "score", "min_score": None, "retrieved_chunks": 1, "rerank": 0, "likelihood": False},
    )
    config = evolve(engine.config, retrieved_tokens=options.pop("retrieved_tokens", RETRIEVED))
    own = evolve(engine.mechanism.options, **{**usual, "likelihood": False, **options})
    engine.mechanism = type(engine.mechanism)(config, engine.mechanism.additions, own)


def told(model: Any, count: int = 3, tokenizer: Any = None) -> Any:
    memory = model.new_memory(tokenizer=tokenizer)
    for place in range(count):
        memory.write(text(6, place), f"s{place}")
    return memory


def chosen(model: Any, memory: Any, prompt: Tensor, **options: Any) -> list[str]:
    """The sources of the chunks that are read, in order."""
    output = model(prompt[None], memory=memory, output_sources=True, **options)
    return [one.source for one in output.memory_sources[0][0]]


@pytest.mark.parametrize(
    ("scores", "options", "wanted"),
    [
        ([5.0, 4.5, 3.0], {}, ["s1"]),  # s0 and s1 are near-equal: the newer
        ([5.0, 3.9, 3.0], {}, ["s0"]),
        ([5.0, 5.0, 5.0], {}, ["s2"]),
        ([5.0, 4.5, 3.0], {"retrieved_chunks": 3}, ["s2", "s0", "s1"]),  # the best last
        ([5.0, 4.5, 3.0], {"retrieved_chunks": 3, "order": "written"}, ["s0", "s1", "s2"]),
        ([5.0, 1.9, 2.0], {"retrieved_chunks": 3}, ["s0"]),  # above the threshold of 2 only
        ([1.0, 2.0, 0.0], {}, []),
        ([1.0, 2.0, 0.0], {"min_score": 1.5}, ["s1"]),
        ([1.0, -3.0, -9.0], {"min_score": 0, "retrieved_chunks": None}, ["s2", "s1", "s0"]),
        ([5.0, 4.5, 3.0], {"retrieved_chunks": 3, "retrieved_tokens": 12}, ["s0", "s1"]),
    ],
)
def test_the_best_that_have_room_come_back_and_the_newer_of_near_equal_ones(
    model: Any, scores: list[float], options: dict[str, Any], wanted: list[str]
) -> None:
    set_options(model, **options)
    Given.told = scores
    assert chosen(model, told(model), text(5, 9)) == wanted


def test_a_call_may_say_how_high_scores_must_be(model: Any) -> None:
    set_options(model, order="written", retrieved_chunks=None)
    memory, Given.told = told(model), [5.0, 3.0, -1.0]
    prompt = text(5, 9)
    assert chosen(model, memory, prompt) == ["s0", "s1"]
    assert chosen(model, memory, prompt, min_score=4) == ["s0"]
    assert chosen(model, memory, prompt, min_score=0) == ["s0", "s1", "s2"]
    assert chosen(model, memory, prompt, min_score=9) == []
    with model.reading(memory, min_score=4):
        read = model(prompt[None], output_sources=True)
    assert [one.source for one in read.memory_sources[0][0]] == ["s0"]
    bare = model(prompt[None]).logits
    assert torch.equal(model(prompt[None], memory=memory, min_score=9).logits, bare), "nothing is put in front"
    with pytest.raises(ConfigError, match="min_score must be a number, or None, got 'high'"):
        model(prompt[None], memory=memory, min_score="high")


def test_the_decoder_says_behind_which_chunk_a_question_is_likely(model: Any) -> None:
    set_options(model, rerank=3, likelihood=True)
    memory, question = told(model, 4), text(5, 9)
    engine, (view,) = model.mplus_engine, memory.snapshot()
    asked = Asked(view, state_of(view).begin_rows, question, question, 99)
    with torch.no_grad():
        (likely,) = likelihoods(engine.decoder, [(asked, torch.tensor([3, 0, 1, 2]))])
        for place, seed in enumerate((3, 0, 1, 2)):
            ids = torch.cat([torch.tensor([BOS]), text(6, seed), question])[None]
            expected = model(ids).logits[0, -5:-1].log_softmax(-1).gather(1, question[1:, None]).squeeze(1)
            assert torch.allclose(likely[place].float(), expected, atol=1e-4)
    # Half a unit of the score for each nat decides among the best three, of which no two are near-equal then.
    total = likely.sum(1).tolist()
    for first in (1, 2, 3):
        Given.told = [20.0, *(50 - 0.5 * total[(chunk + 1) % 4] + 4 * (chunk == first) for chunk in (1, 2, 3))]
        assert chosen(model, memory, question) == [f"s{first}"]
    Given.told = [99.0, 3.0, 3.0, 2.5]  # the first by far, however likely
    assert chosen(model, memory, question) == ["s0"]


@pytest.mark.parametrize(
    ("scores", "nats", "wanted"),
    [
        ([9.0, 9.0, 3.0], [[-2, -2], [-2, -2], [-2, -2]], "s1"),  # as good and as likely: the newer
        ([9.0, 6.1, 3.0], [[-2, -2], [-2, -2], [-2, -2]], "s1"),  # near enough
        ([9.0, 5.9, 3.0], [[-2, -2], [-2, -2], [-2, -2]], "s0"),  # too far
        ([9.0, 9.0, 3.0], [[-2, -2], [-3.4, -1], [-2, -2]], "s1"),  # no token is much less likely
        ([9.0, 9.0, 3.0], [[-2, -2], [-3.6, -1], [-2, -2]], "s0"),  # one is: it says something else
        ([9.0, 9.0, 9.0], [[-2, -2], [-8, -2], [-2, -2]], "s2"),
        ([5.0, 5.0, 5.0], [[], [], []], "s2"),  # a question of one token
    ],
)
def test_the_newer_of_two_that_explain_every_word_of_a_question_alike_goes_first(
    model: Any, monkeypatch: pytest.MonkeyPatch, scores: list[float], nats: list[list[float]], wanted: str
) -> None:
    set_options(model, rerank=3, likelihood=True)
    memory, Given.told = told(model), scores

    def given(decoder: Any, asked: Any) -> list[Tensor]:
        return [torch.tensor([nats[chunk] for chunk in chunks.tolist()], dtype=torch.float64) for _, chunks in asked]

    monkeypatch.setattr("mplus.mechanisms.kv.ranking.likelihoods", given)
    assert chosen(model, memory, text(5, 9)) == [wanted]


def test_tokens_of_a_question_are_matched_with_the_values_of_a_chunk(model: Any, cache: Path) -> None:
    set_options(model, rerank=3, min_score=-1e9)
    engine, tokenizer, question = model.mplus_engine, SmallTokenizer(), text(5, 9)
    memory = told(model, tokenizer=tokenizer)
    (view,) = memory.snapshot()
    state, kept = state_of(view), engine.decoder.kept
    *layers, mean, deviation = state.late_interaction.tolist()
    assert layers == sorted({0, 1, 2, 3} & set(layers))
    asked = Asked(view, state.begin_rows, question, question[:0], 99)
    retrieval = Retrieval(retriever=engine.mechanism.chunk_retriever, rerank=3)
    ((form,),) = retrieval.queries(engine.decoder, [asked], tokenizer)
    with torch.no_grad():
        bare = model.new_memory(tokenizer=None)
        bare.write(question)  # written behind the same begin, so its rows have the values of the question's tokens
    (other,) = bare.snapshot()
    expected, matches = [], []
    for chunk in range(3):
        best = []
        for token in range(5):
            cosines = [
                torch.stack(
                    [
                        torch.cosine_similarity(one[None], two[None])[0]
                        for layer in layers
                        for one, two in zip(
                            values_in(kept, rows_of(other, int(layer), torch.tensor([token])))[0],
                            values_in(kept, rows_of(view, int(layer), torch.tensor([place])))[0],
                            strict=True,
                        )
                    ]
                ).mean()
                for place in range(6 * chunk, 6 * chunk + 6)
            ]
            best.append(max(map(float, cosines)))
        matches.append(best)
    # A token counts by the square of how far the chunks differ in it.
    spread = [(max(token) - min(token)) ** 2 for token in zip(*matches, strict=True)]
    for best in matches:
        weighed = sum(one * weight for one, weight in zip(best, spread, strict=True)) / sum(spread)
        expected.append((weighed - mean) / deviation)
    (found,) = ranked(engine.decoder, [(asked, [form], given_scores(3))], 0.25, False)
    assert found.weights.tolist() == pytest.approx([4 * one for one in expected], abs=1e-3)
    (nats,) = likelihoods(engine.decoder, [(asked, torch.arange(3))])
    (both,) = ranked(engine.decoder, [(asked, [form], given_scores(3))], 0.25, True)
    assert torch.allclose(both.weights, found.weights + nats.sum(1) / 2)
    (nothing,) = ranked(engine.decoder, [(asked, [evolve(form, values=None)], given_scores(3))], 0.25, False)
    assert nothing.weights.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("scores", "second", "wanted"),
    [
        ([20.0, 15.0, 3.0], 0, "s1"),  # the same words again, later
        ([20.0, 13.9, 3.0], 0, "s0"),  # by far a worse answer to this question
        ([20.0, 15.0, 3.0], 1, "s0"),  # other words
        ([20.0, 19.8, 3.0], 1, "s1"),  # near-equal
    ],
)
def test_the_newer_of_chunks_that_resemble_each_other_goes_first(
    model: Any, cache: Path, scores: list[float], second: int, wanted: str
) -> None:
    set_options(model, rerank=3)
    Given.told = scores
    memory = model.new_memory(tokenizer=SmallTokenizer())
    for place, seed in enumerate((0, second, 2)):
        memory.write(text(6, seed), f"s{place}")
    with pytest.MonkeyPatch.context() as patch:  # of tokens that were not trained, all values match more or less
        patch.setattr("mplus.mechanisms.kv.ranking.ALIKE", 0.99)
        patch.setattr("mplus.mechanisms.kv.ranking.MATCH", 0.0)
        assert chosen(model, memory, text(5, 9)) == [wanted]


@pytest.mark.parametrize(
    ("matched", "wanted"),
    [
        ([9.0, 8.2, 4.0], [True, True, False]),  # two stand out
        ([9.0, 8.2, 7.8], [True, False, False]),  # the third is nearer to the second than that is to the first
        ([9.0, 7.4, 1.0], [True, False, False]),  # too far from the first
        ([9.0, 9.9, 4.0], [True, True, False]),  # the best one by its scores, which the second matches better
        ([9.0, 8.2], [True, True]),
        ([0.0, 0.0, 0.0], [False, False, False]),  # nothing to compare
    ],
)
def test_what_answers_a_question_as_the_best_does_stands_out_with_it(matched: list[float], wanted: list[bool]) -> None:
    assert answering(torch.tensor(matched, dtype=torch.float64), torch.tensor(0)).tolist() == wanted


def test_what_is_said_later_of_the_same_in_other_words_goes_first(
    model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_options(model, rerank=3)
    matched, alike = torch.tensor([8.0, 2.0, 7.5], dtype=torch.float64), torch.full((3, 3), 0.6)
    monkeypatch.setattr(
        "mplus.mechanisms.kv.ranking._matched", lambda decoder, asked, questions, chunks: (matched[chunks], alike)
    )
    Given.told = [9.0, 4.0, 6.0]

    def told_at(hours: list[int], names: list[str]) -> Any:
        now = datetime(2026, 5, 3, tzinfo=UTC)
        memory = model.new_memory(tokenizer=SmallTokenizer(), clock=lambda: now)
        for place, (hour, name) in enumerate(zip(hours, names, strict=True)):
            now = now.replace(hour=hour)
            memory.write(text(6, place), name)
        return memory

    question, names = text(5, 9), ["s0", "s1", "s2"]
    assert chosen(model, told_at([1, 2, 3], names), question) == ["s2"]
    assert chosen(model, told_at([1, 1, 1], names), question) == ["s0"], "of the same moment"
    assert chosen(model, told_at([3, 2, 1], names), question) == ["s0"], "s2 is said to be older"
    monkeypatch.setattr("mplus.mechanisms.kv.ranking.RELATED", 0.7)
    assert chosen(model, told_at([1, 2, 3], names), question) == ["s0"], "of something else"


@pytest.mark.parametrize(("name", "wanted"), [("letter", False), (None, True)])
def test_a_text_does_not_correct_itself(model: Any, name: str | None, wanted: bool) -> None:
    memory = model.new_memory()
    for place in range(2):
        memory.write(text(6, place), name)
    (view,) = memory.snapshot()
    asked = Asked(view, state_of(view).begin_rows, text(5, 9), text(5, 9), 99)
    assert written_later(asked, torch.tensor([0, 1]), torch.tensor(0)).tolist() == [False, wanted]


def given_scores(count: int) -> ChosenChunks:
    return ChosenChunks(torch.arange(count), torch.zeros(count, dtype=torch.float64))


def test_a_batch_chooses_as_each_row_alone(model: Any) -> None:
    set_options(model, retrieved_chunks=2, rerank=3, likelihood=True)
    memory, Given.told = told(model), [5.0, 4.9, 4.8]
    prompts = torch.stack([text(7, 11), text(7, 12)])
    both = model(prompts, memory=memory, output_sources=True).memory_sources
    alone = [chosen(model, memory, prompt) for prompt in prompts]
    assert [[one.source for one in row[0]] for row in both] == alone


def test_a_question_is_also_asked_without_the_instruction_behind_it() -> None:
    class Marks(SmallTokenizer):
        def convert_ids_to_tokens(self, ids: Any) -> list[str]:
            return ["Ġwhere?" if one == 5 else "Ġw" for one in ids]

    ids = torch.tensor([1, 5, 2, 5, 3])
    assert [one.tolist() for one in _parts(ids, Marks())] == [[1, 5, 2, 5, 3], [1, 5, 2, 5]]
    assert [one.tolist() for one in _parts(ids[:4], Marks())] == [[1, 5, 2, 5]]
    assert [one.tolist() for one in _parts(ids[:1], Marks())] == [[1]]
    assert [one.tolist() for one in _parts(ids, None)] == [[1, 5, 2, 5, 3]]


# ---------------------------------------------------------------------- what is known of a decoder


def scores_of(model: Any, memory: Any, tokenizer: Any) -> list[float]:
    """The scores of all chunks for a question."""
    (view,) = memory.snapshot()
    asked = Asked(view, state_of(view).begin_rows, text(4, 0)[:3], torch.empty(0, dtype=torch.int64), 99)
    retrieval = Retrieval(retriever=model.mplus_engine.mechanism.chunk_retriever, min_score=-1e9)
    (found,) = retrieval.choose(model.mplus_engine.decoder, [asked], tokenizer)
    return [float(found.scores[found.chunks.tolist().index(chunk)]) for chunk in range(3)]


def test_it_is_found_once_and_kept_in_the_cache_folder_and_in_the_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = wrapped(retriever="hybrid", rerank=0), SmallTokenizer()
    assert cache_folder() / "calibrations" == cache
    memory = told(model, tokenizer=tokenizer)
    state, (file,) = memory.states[0], cache.iterdir()
    assert state.chunk_key.shape == (3, 3 * model.config.hidden_size)
    assert state.chunk_key.dtype == torch.float16
    before = scores_of(model, memory, tokenizer)
    memory.save(tmp_path / "memory")
    written = file.read_bytes()
    again = wrapped(retriever="hybrid", rerank=0)
    with monkeypatch.context() as patch:  # another process, which finds it in the folder
        patch.setattr(type(again.mplus_engine.mechanism.chunk_retriever), "calibrate", None)
        assert torch.equal(told(again, tokenizer=tokenizer).states[0].calibration, state.calibration)
    file.unlink()
    loaded = mplus.Memory.load(tmp_path / "memory", again, tokenizer=tokenizer)
    assert scores_of(again, loaded, tokenizer) == pytest.approx(before, abs=1e-4)
    assert not file.exists(), "a saved memory carries its own"
    file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        anew = told(wrapped(retriever="hybrid", rerank=0), tokenizer=tokenizer)
    assert "is made anew" in caplog.text
    assert torch.equal(anew.states[0].calibration, state.calibration)
    assert file.read_bytes() == written


def test_another_decoder_has_another_and_no_tokenizer_none(cache: Path) -> None:
    tokenizer = SmallTokenizer()
    first = told(wrapped(retriever="hidden", rerank=0), 1, tokenizer).states[0]
    other = wrapped(retriever="hidden", rerank=0)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.5)
    assert not torch.equal(told(other, 1, tokenizer).states[0].calibration, first.calibration)
    assert len(list(cache.iterdir())) == 2
    memory = told(wrapped(retriever="hybrid", rerank=0), 2)
    assert (memory.states[0].calibration.numel(), tuple(memory.states[0].chunk_key.shape)) == (0, (2, 0))
    memory.tokenizer = tokenizer  # too late: chunks without keys are found by their words
    memory.write(text(6, 8), "late")
    assert tuple(memory.states[0].chunk_key.shape) == (3, 0)


def test_save_pretrained_takes_it_along(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(retriever="hidden", rerank=0)
    found = told(model, 1, SmallTokenizer()).states[0].calibration
    model.save_pretrained(tmp_path / "model")
    (file,) = cache.iterdir()
    file.unlink()
    again = mplus.from_pretrained(tmp_path / "model", base=BY_NAME["llama"].build(0), check=False)
    monkeypatch.setattr(type(again.mplus_engine.mechanism.chunk_retriever), "calibrate", None)
    assert torch.equal(told(again, 1, SmallTokenizer()).states[0].calibration, found)
    (tmp_path / "model" / "calibrations.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"calibrations\.safetensors must be a whole safetensors file"):
        mplus.from_pretrained(tmp_path / "model", base=BY_NAME["llama"].build(0), check=False)
    model = mplus.wrap(mplus.unwrap(model), {"mechanism": "kv"}, check=False)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "calibrations.safetensors").exists(), "that of an earlier save"


def test_forgotten_chunks_take_their_keys_along(cache: Path) -> None:
    memory = told(wrapped(retriever="hidden", rerank=0), tokenizer=SmallTokenizer())
    keys = memory.states[0].chunk_key
    memory.forget("s1")
    assert torch.equal(memory.states[0].chunk_key, keys[[0, 2]])


def test_a_folder_that_cannot_be_written_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MPLUS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        memory = told(wrapped(retriever="hidden", rerank=0), 1, SmallTokenizer())
    assert "cannot be written" in caplog.text
    assert len(memory.states[0].calibration)


def test_a_new_memory_is_calibrated_in_a_directory_too_and_without_a_tokenizer_says_once_what_is_lost(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(retriever="hidden", rerank=0)
    with caplog.at_level(logging.WARNING):
        mplus.Memory.open(tmp_path / "memory", model, tokenizer=SmallTokenizer()).close()
        assert len(list(cache.iterdir())) == 1, "before anything is written"
        assert not caplog.records
        for _ in range(2):
            model.new_memory()
    (said,) = caplog.messages
    assert "without a tokenizer is searched by its token ids alone" in said
