"""SCM keeps turns, ranks them, decides about them, ends where nothing fits; its cases are computed as recorded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mplus_scm.controller
import mplus_scm.forms
import mplus_scm.mechanism
import mplus_scm.player
import mplus_scm.ranking
import pytest
import torch
from mplus_scm import SCMMechanism
from mplus_scm.controller import Controller, shared_words, summary_of
from mplus_scm.forms import Sizes, as_released, form_of_last

import mplus
from mplus.errors import ConfigError
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.interop import replay
from mplus.mechanisms import MECHANISMS, Entry, Recalled, TokenBudget, options_of
from mplus.testing.mechanisms import TextMechanismConformance

GOLDENS = Path(__file__).parent / "goldens"


class TestConformance(TextMechanismConformance):
    implementation = SCMMechanism


@pytest.mark.nightly
class TestPublished(TextMechanismConformance):
    implementation = SCMMechanism
    settings: ClassVar[dict[str, Any]] = {"variant": "published"}


def test_installed_under_its_name() -> None:
    assert MECHANISMS.get("scm") is SCMMechanism


# ---------------------------------------------------------------- the cases


def test_every_case_is_computed_as_recorded() -> None:
    [report] = replay(GOLDENS)
    assert report.passed(), report
    assert (report.steps, report.skipped, report.tolerance) == (12, {}, 1e-6)
    assert report.worst < 1e-8


def with_(module: Any, name: str, wrong: Any) -> Any:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **named: wrong(own, *given, **named))

    return plant


P, F = mplus_scm.player, mplus_scm.forms
MISTAKES = {
    "the last turn is ranked": with_(P, "rank", lambda own, r, t, n, **o: own(torch.cat([r, r[:1]]), [*t, 0], n, **o)),
    "no recency": with_(P, "rank", lambda own, *g, **o: own(*g, **{**o, "recency": 0})),
    "recency grows": with_(P, "rank", lambda own, r, t, n, **o: own(r, t, n, **{**o, "decay": 1 / o["decay"]})),
    "one turn less": with_(P, "rank", lambda own, *g, **o: own(*g, **{**o, "k": o["k"] - 1})),
    "worst first": with_(P, "rank", lambda own, *g, **o: own(*g, **o)[::-1]),
    "dot product": with_(P, "cosines", lambda own, q, v: 2.0 * own(q, v)),
    "the last turn raw at any length": with_(P, "form_of_last", lambda own, s, most, **o: ("raw", s.raw)),
    "summaries of short turns too": with_(P, "by_paper", lambda own, p, r, e, t, i: own(p, r, e, t, 0)),
    "summaries that are not enough": with_(
        P, "by_paper", lambda own, p, r, e, t, i: own(p, r, lambda turn: True, t, i)
    ),
    "best match first": with_(P, "as_released", lambda own, p, *g: own(p[::-1], *g)),
    "nothing is dropped": with_(P, "as_released", lambda own, p, s, n, a, b: own(p, s, n, lambda t, f: f == "raw", b)),
    "the last turn is not counted": with_(P, "as_released", lambda own, p, s, last, a, b: own(p, s, 0, a, b)),
    "fits always": with_(
        P, "as_released", lambda own, *g: mplus_scm.forms.Chosen((c := own(*g)).forms, c.tokens, True)
    ),
    "(A) first": with_(P, "verdict", lambda own, answer: "(A)" in answer),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_replay(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[mistake](monkeypatch)
    monkeypatch.setitem(P.BEHAVIOURS, "the controller's verdict", lambda given: P.verdict(given["answer"]))
    [report] = replay(GOLDENS)
    assert not report.passed()


def test_the_readme_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code, shown = text.partition("```python\n")[2].split("\n```\n\n```text\n", 1)
    exec(code, {})
    assert capsys.readouterr().out == shown.partition("```")[0]


# ---------------------------------------------------------------- reading


class Asked:
    """Stands in for a decoder: counts words, says what it is given to say, keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.prompts = list(answers), []

    def __call__(self, prompt: str, tokens: int, stop: Any = (), choices: Any = (), patience: int = 1) -> str:
        self.prompts.append(prompt)
        said = self.answers[min(len(self.prompts), len(self.answers)) - 1]
        return next((choice for choice in choices if said in choice), said)

    def count(self, text: str) -> int:
        return len(text.split())


def entries(*texts: Any) -> list[Entry]:
    fields = [(text,) if isinstance(text, str) else text for text in texts]
    return [Entry(one, f"s{place}", place) for place, one in enumerate(fields)]


def recalled(kept: list[Entry], prompt: str, *, tokens: int = 10_000, ask: Any = None, **options: Any) -> Recalled:
    given = {**SCMMechanism.Options.defaults(options.pop("variant", "paper")), **options}
    mechanism = SCMMechanism(SimpleNamespace(), options_of(SCMMechanism, given))  # type: ignore[arg-type]
    return mechanism.recall(kept, prompt, ask or Asked("(A)"), TokenBudget(tokens, lambda text: len(text.split())))


KEPT = entries("Ada has a cat.", "Ben has a red boat.", "It rains.", "Good night.")


def test_the_best_turns_stand_in_order_and_the_last_one_behind_them() -> None:
    found = recalled(KEPT, "Which boat has Ben, and which cat Ada?", turns=2, recency=0.0)
    assert found.text == (
        "Related conversation history:\n[Turn 1]\nAda has a cat.\n\n[Turn 2]\nBen has a red boat.\n\n"
        "Previous conversation:\n[Turn 4]\nGood night.\n\n"
    )
    assert found.entries == (KEPT[0], KEPT[1], KEPT[3])
    assert min(found.scores[:2]) > found.scores[2] == 0.0


def test_recency_counts_by_the_paper_only() -> None:
    paper, published = recalled(KEPT, "Hm?", turns=1), recalled(KEPT, "Hm?", turns=1, variant="published")
    assert "[Turn 3]" in paper.text
    assert "[Turn 1]" in published.text, "nothing is relevant, and the first one comes first"
    assert paper.scores[0] == pytest.approx(0.995**2)


def test_the_first_decision_leaves_earlier_turns_out() -> None:
    no, asked = Asked("(B)"), Asked("(B)")
    assert recalled(KEPT, "Ada?", ask=no).entries == (KEPT[-1],)
    assert "Ada?" in no.prompts[0]
    assert len(recalled(KEPT, "Ada?", ask=asked, needed="off").entries) == 4
    assert asked.prompts == []
    assert len(recalled(KEPT, "Which cat?", ask=asked, needed="rule").entries) == 4
    assert len(recalled(KEPT, "Which zebra?", ask=asked, needed="rule").entries) == 1
    assert len(recalled(KEPT, "Ada?", ask=Asked("so (B)"), needed="answer").entries) == 1


def test_the_second_decision_makes_summaries_of_long_turns() -> None:
    long = entries(("word " * 900, "Short."), ("talk " * 1200, "Brief."), "Last.")
    found = recalled(long, "word?", needed="off")
    assert "Short." in found.text
    assert "Brief." in found.text
    raw = recalled(long, "word?", needed="off", ask=Asked("(B)"))
    assert "word word" in raw.text
    assert "talk talk" in raw.text
    few = recalled(long, "word?", needed="off", total_tokens=5000)
    assert "word word" in few.text


def test_as_released_turns_without_an_answer_are_dropped() -> None:
    long = entries(("word " * 2000, "Short."), ("talk " * 1200, "Brief."), "Last.")
    found = recalled(long, "word?", variant="published", ask=Asked("(B)"))
    assert found.entries == (long[0], long[2]), "the best match is not judged"
    assert "word word" in found.text


def test_the_last_turn_is_shown_as_its_summary_where_it_is_long() -> None:
    last = ("end " * 600, "The end.")
    assert "The end." in recalled(entries(last), "Hm?").text
    assert form_of_last(Sizes(500, 9)) == ("summary", 9)
    assert form_of_last(Sizes(500, 9), published=True) == ("summary", 500)


@pytest.mark.parametrize("variant", ["paper", "published"])
@pytest.mark.parametrize("tokens", [1, 5, 12, 40, 300, 3000])
def test_it_ends_where_not_even_the_summaries_fit(variant: str, tokens: int) -> None:
    long = entries(*[(f"w{place} " * 900, f"s{place} " * 80) for place in range(8)])
    found = recalled(long, "w3 s3", variant=variant, tokens=tokens, turns=8)
    assert len(found.text.split()) <= tokens
    assert (found.text == "") == (found.entries == ()) == (tokens < 85)
    assert tokens < 200 or long[3] in found.entries
    fits = as_released([0, 1], {0: Sizes(9, 8), 1: Sizes(9, 8)}, 5, lambda turn, form: True, budget=3)
    assert (fits.fits, fits.tokens) == (False, 21)


def test_a_decision_that_does_not_fit_is_a_yes_and_is_not_put() -> None:
    asked = Asked("(B)")
    assert Controller(asked, 20, 0.3).decide("decoder", "word " * 30, "Hm?", "x")
    assert asked.prompts == []


def test_words_that_are_common_do_not_decide() -> None:
    assert shared_words("Where is the key?", "The key lies there.") == 1.0
    assert shared_words("Where is the key?", "Where is the cat?") == 0.0
    assert shared_words("Where is it?", "x") == 1.0


def test_summaries() -> None:
    assert summary_of("One. Two.", "first", Asked("")) == "One."
    assert summary_of("No end", "first", Asked("")) == "No end"
    assert summary_of("One. Two.", "off", Asked("")) == "One. Two."
    assert summary_of("One. Two.", "decoder", Asked(" Both. ")) == "Both."
    assert summary_of("One. Two.", "decoder", Asked("  ")) == "One. Two.", "a decoder that says nothing leaves the text"


@pytest.mark.parametrize("relevance", ["words", "ngrams", "hidden:0", "hidden:2"])
def test_it_reads_with_a_decoder(relevance: str) -> None:
    tokenizer = load_tokenizer()
    config = {"mechanism": {"name": "scm", "relevance": relevance, "summaries": "first", "summary_from": 20}}
    model = mplus.wrap(load_decoder(), config)
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("The key is under the blue stone. It is an old key, and nobody knows what it is for.", source="a")
    memory.write("Tom is at home.", source="b")
    assert [len(entry.fields) for entry in memory.states[0].entries()] == [2, 1]
    ids = tokenizer("Where is the key?", return_tensors="pt")
    out = model.generate(**ids, memory=memory, max_new_tokens=4, output_sources=True, return_dict_in_generate=True)
    assert "b" in [one.source for one in out.memory_sources[0][0]]
    assert memory.search("key", k=1)[0].source == "a"
    memory.forget("a")
    assert [one.source for one in memory.search("key", k=3)] == ["b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relevance": "best"}, "relevance must be where vectors come from"),
        ({"decay": 1.5}, "decay must be a number from 0 to 1"),
        ({"needed": "always"}, "needed must be one of 'decoder', 'answer', 'rule', 'off'"),
        ({"turns": 0}, "turns must be a whole number of at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mplus.wrap(load_decoder(), {"mechanism": {"name": "scm", **options}})
