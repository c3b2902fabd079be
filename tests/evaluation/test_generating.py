"""Greedy answers: the same alone and in a batch, with and without memory, what is said about them, and their scores."""

from __future__ import annotations

import pytest
import torch

from mplus.errors import ConfigError
from mplus.evaluation.generating import Generation, Scoring, answers, cache_bytes, f1, normalised
from tests.evaluation.bench import SmallTokenizer, model
from tests.memory.tiny import assert_content, content, ids, written

pytestmark = pytest.mark.two_computations

PROMPTS = [[5, 9, 40], [7], [11, 12, 13, 14, 15, 16]]


@torch.no_grad()
def step_by_step(prompt, tokens, memory=None):
    """Greedy decoding without any cache; ids and the logits of the first one."""
    text, first = list(prompt), None
    for _ in range(tokens):
        logits = model()(input_ids=torch.tensor([text]), **({} if memory is None else {"memory": memory})).logits[0, -1]
        first = logits if first is None else first
        text.append(int(logits.argmax()))
    return text[len(prompt) :], first


def test_without_memory_it_is_greedy_decoding():
    found = answers(model(), SmallTokenizer(), PROMPTS, Generation(tokens=4, batch=2))
    for prompt, one in zip(PROMPTS, found, strict=True):
        expected, first = step_by_step(prompt, 4)
        assert list(one.ids) == expected
        assert one.text == " ".join(f"w{number}" for number in expected)
        probabilities = first.softmax(-1)
        assert one.top == pytest.approx(float(probabilities.max()), rel=1e-4)
        entropy = torch.distributions.Categorical(probs=probabilities).entropy()
        assert one.entropy == pytest.approx(float(entropy), rel=1e-4)
        assert one.cache_bytes == 2 * 3 * 16 * 4  # keys and values, layers, two heads of 8 wide, float32


def test_each_prompt_reads_its_own_stream():
    memory = written("paper", [60, 80, 100])
    before = content(memory)
    generation = Generation(tokens=3, batch=2)
    decoder = memory.engine.model
    found = answers(decoder, SmallTokenizer(), PROMPTS, generation, memory)
    assert_content(memory, before)
    for row, (prompt, one) in enumerate(zip(PROMPTS, found, strict=True)):
        [alone] = answers(decoder, SmallTokenizer(), [prompt], generation, memory.select([row]))
        assert one.ids == alone.ids
        assert one.entropy == pytest.approx(alone.entropy, rel=1e-3)


def test_answers_end_at_the_end_of_sequence():
    [free] = answers(model(), SmallTokenizer(), [PROMPTS[0]], Generation(tokens=4))
    [ended] = answers(model(), SmallTokenizer(), [PROMPTS[0]], Generation(tokens=4, eos=(free.ids[2],)))
    assert ended.ids == free.ids[: free.ids.index(free.ids[2])]
    [nothing] = answers(model(), SmallTokenizer(), [PROMPTS[0]], Generation(tokens=4, eos=(free.ids[0],)))
    assert nothing.ids == ()
    assert nothing.text == ""


def test_begin_of_sequence_ids():
    generation = Generation(bos=1)
    assert generation.prompt([7], memory=False) == [1, 7]
    assert generation.prompt([7], memory=True) == [7]
    assert Generation(bos=1, bos_with_memory=True).prompt([7], memory=True) == [1, 7]
    assert Generation().prompt([7], memory=False) == [7]

    class Tokenizer:
        bos_token_id, eos_token_id = 4, 5

    assert Generation.of(Tokenizer(), tokens=2) == Generation(bos=4, eos=(5,), tokens=2)
    assert Generation.of(Tokenizer(), eos=()).eos == ()


def test_empty_prompts():
    with pytest.raises(ConfigError, match="every prompt must have at least one token"):
        answers(model(), SmallTokenizer(), [[1], []], Generation())


def test_bytes_of_a_cache():
    with torch.no_grad():
        cache = model()(input_ids=ids(10)[None], use_cache=True).past_key_values
    assert cache_bytes(cache) == 10 * 2 * 3 * 16 * 4
    assert cache_bytes(None) == 0


def test_cutting_at_the_first_stop():
    assert Scoring().cut("  Paris is\nnot Rome") == "Paris is"
    assert Scoring(stop=(".", "Question")).cut("Paris Question: x. y") == "Paris"
    assert Scoring(stop=()).cut("a\nb ") == "a\nb"


@pytest.mark.parametrize(
    ("rule", "text", "answer", "expected"),
    [
        ({}, "It is Paris now", "Paris", True),
        ({}, "It is paris now", "Paris", False),
        ({"normalise": "squad"}, "It is paris, now", "Paris", True),
        ({}, "comparison", "Paris", False),
        ({}, "13 cows", "3", True),
        ({"correct": "contains_words"}, "13 cows", "3", False),
        ({"correct": "contains_words"}, "(3) cows", "3", True),
        ({"correct": "contains_words"}, "cost: $12", "$12", True),
        ({"correct": "exact"}, "Paris", "Paris", True),
        ({"correct": "exact"}, "Paris now", "Paris", False),
        ({"correct": "exact", "normalise": "squad"}, "the Paris!", "paris", True),
        ({}, "Rome\nParis", "Paris", False),  # after the stop
        ({"normalise": "squad"}, "anything", "the", False),  # normalised away, it must not be a part of everything
        ({"normalise": "squad"}, "I mean the one", "the", True),
    ],
)
def test_correct(rule, text, answer, expected):
    assert Scoring(**rule).is_correct(text, (answer,)) is expected


def test_any_of_several_answers_will_do_and_none_never():
    assert Scoring().is_correct("in 1990", ("ninety", "1990"))
    assert not Scoring().is_correct("in 1990", ())
    assert Scoring().scores("in 1990", ()) == {"exact_match": 0.0, "f1": 0.0}


def test_exact_match_and_f1():
    assert normalised("The  Cat, a dog.") == "cat dog"
    assert f1("the red cat", "a cat") == pytest.approx(2 * 1 / 3)
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert f1("", "the") == 1.0
    assert f1("dog", "cat") == 0.0
    assert Scoring().scores("The Cat\nx", ("dog", "cat")) == {"exact_match": 1.0, "f1": 1.0}


def test_bad_rules():
    with pytest.raises(ConfigError, match="correct must be one of 'contains', 'contains_words', 'exact', got 'maybe'"):
        Scoring(correct="maybe")
