"""RET-LLM writes triples, is asked for them while a text is generated, and keeps to what was computed of its paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import mplus_retllm.calls
import mplus_retllm.player
import mplus_retllm.table
import pytest
import torch
from mplus_retllm import RETLLMMechanism, write_call

import mplus
from mplus.errors import ConfigError, InputError
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.hf.text.encoding import encoded
from mplus.interop import replay
from mplus.mechanisms import MECHANISMS
from mplus.testing.mechanisms import TextMechanismConformance
from tests.mechanisms.text.phonebook import Script

GOLDENS, END = Path(__file__).parent / "goldens", 2


class TestConformance(TextMechanismConformance):
    implementation = RETLLMMechanism

    def text(self, seed: int) -> str:
        name, _, _, thing, _, _, place = super().text(seed).rstrip(".").split()
        return f"[MEM_WRITE{{{name}>>{thing}>>{place}}}]"

    def traces(self, text: str) -> dict[str, bytes]:
        return {"its first field": text.partition("{")[2].partition(">>")[0].encode()}


@pytest.mark.nightly
class TestCallsForPrompts(TestConformance):
    options: ClassVar[dict[str, Any]] = {"reads": "prompt"}

    def test_another_decoder_reads_the_same(self, model: Any, tmp_path: Path) -> None:
        """Another decoder has the same memory; which call it makes for a prompt is its own choice."""
        memory = self.written(model, 1, 2)
        memory.save(tmp_path / "saved")
        with self.wrapped(torch.float32) as other:
            assert self.differences(self.loaded(tmp_path / "saved", other), memory) == []


def test_installed_under_its_name() -> None:
    assert MECHANISMS.get("retllm") is RETLLMMechanism


# ---------------------------------------------------------------- the cases


def test_every_case_is_computed_as_recorded() -> None:
    [report] = replay(GOLDENS)
    assert report.passed(), report
    assert (report.steps, report.skipped, report.tolerance) == (14, {}, 1e-6)


P, T, C = mplus_retllm.player, mplus_retllm.table, mplus_retllm.calls


def all_columns(self: Any, term: str, terms: Any) -> str:
    """The nearest term of any column."""
    return ALL_TERMS[int(torch.stack([self.vectors([term])[0] @ self.vectors([one])[0] for one in ALL_TERMS]).argmax())]


ALL_TERMS = ["employment", "customer", "Dorothea", "Pfizer", "BMW"]
OWN = T.matches
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "the last row only": (P, "matches", lambda *g: OWN(*g)[-1:]),
    "rows twice": (P, "matches", lambda *g: OWN(*g) * 2),
    "never exchanged": (T.Neighbours, "nearest", lambda *g: None),
    "the first term": (T.Neighbours, "nearest", lambda self, term, terms: terms[-1]),
    "exchanged for a term of another column": (T.Neighbours, "nearest", all_columns),
    "given fields are left out": (P, "matches", lambda rows, q, n: OWN(rows, (None, *q[1:]), n)),
    "other sides of the planes": (P, "bucket", lambda planes, vector: vector @ planes.T < 0),
    "a comma between triples": (P, "response", lambda triples: C.response(triples).replace(";", ",")),
    "marks are left out": (P, "response", lambda triples: C.response(triples).replace("{", "")),
    "unfinished writes count": (P, "writes_in", lambda text: C.writes_in(text.replace("c}", "c}]"))),
    "one write only": (P, "writes_in", lambda text: C.writes_in(text)[:1]),
    "empty fields count": (P, "writes_in", lambda text: C.writes_in(text.replace(">>>>", ">>x>>"))),
    "a full query counts": (C, "BETWEEN", "|"),
    "the place in front of the colon": (P, "first_open_read", lambda text: C.OpenRead(0, None)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_replay(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    monkeypatch.setitem(P.BEHAVIOURS, "response", lambda given: P.response(given["triples"]))
    [report] = replay(GOLDENS)
    assert not report.passed()


def test_calls_that_are_none() -> None:
    assert C.writes_in("[MEM_WRITE{a>>b[MEM_WRITE{c>>d>>e}]") == [("c", "d", "e")]
    assert C.writes_in("[MEM_WRITE{a>>b>>c>>d}]") == []
    assert C.first_open_read("nothing") is None
    assert C.first_open_read("[MEM_READ{a>>b>>") is None
    answered = "[MEM_READ{a>>b>>}:{a>>b>>c}] [MEM_READ{c>>d>>}:"
    assert C.first_open_read(answered) == C.OpenRead(len(answered), ("c", "d", None))


def test_the_newest_wins_where_it_is_asked_for() -> None:
    rows = [("US", "president", "Obama"), ("UK", "king", "Charles"), ("US", "president", "Biden")]
    none: Any = None
    assert T.matches(rows, ("US", "president", None), none) == [0, 2]
    assert T.matches(rows, ("US", "president", None), none, newest=True) == [2]
    assert T.matches(rows, (None, None, "Obama"), none, newest=True) == []
    assert T.matches([*rows, rows[0]], ("US", None, None), none, newest=True) == [0]


def test_near_in_one_table_is_near() -> None:
    vectors = {"a": [1.0, 0.1], "b": [1.0, -0.1], "c": [-1.0, 0.0]}
    planes = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    both = T.Neighbours(lambda texts: torch.tensor([vectors[text] for text in texts]), lambda width: planes)
    one = T.Neighbours(both.vectors, lambda width: planes[:1])
    assert (both.nearest("a", ["c", "b"]), one.nearest("a", ["c", "b"])) == ("b", None)
    assert T.random_planes(2, 3, 4, 0).shape == (2, 3, 4)
    assert torch.equal(T.random_planes(2, 3, 4, 5), T.random_planes(2, 3, 4, 5))


# ---------------------------------------------------------------- with a decoder


LINES = "\n".join(
    write_call(triple.split("|")) for triple in ("Cyrus|customer|Pfizer", "Tia|customer|Pfizer", "Tia|manager|Ben")
)


@pytest.fixture(scope="module")
def model() -> Any:
    return wrapped()


def wrapped(**options: Any) -> Any:
    return mplus.wrap(load_decoder(), {"mechanism": {"name": "retllm", **options}})


def memory_of(model: Any, text: str = LINES) -> Any:
    memory = model.new_memory(tokenizer=load_tokenizer())
    memory.write(text, source="list")
    return memory


def said(model: Any, text: str, memory: Any, new: int = 100) -> tuple[str, str, Any]:
    """What comes back behind the prompt, and what the decoder saw at the end, when it says ``text``; the output."""
    tokenizer = load_tokenizer()
    script = Script([*encoded(tokenizer, text, inside=True), END], END)
    ids = tokenizer("Who buys of Pfizer?", return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, memory=memory, logits_processor=[script], output_sources=True, return_dict_in_generate=True,
        max_new_tokens=new, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    return tokenizer.decode(out.sequences[0, ids.shape[1] :]), tokenizer.decode(script.seen[-1]), out


def test_a_read_is_answered_with_all_matches(model: Any) -> None:
    found, seen, out = said(model, " They are [MEM_READ{>>customer>>Pfizer}: Cyrus and Tia.", memory_of(model))
    assert found == "They are  Cyrus and Tia.</s>"
    answered = "[MEM_READ{>>customer>>Pfizer}:{Cyrus>>customer>>Pfizer};{Tia>>customer>>Pfizer}"
    assert answered in seen
    assert [one.source for one in out.memory_sources[0][0]] == ["list", "list"]


@pytest.mark.parametrize(
    "call",
    ["{a>>b}:", "{a>>b>>c}:", "{>>>>}:", "{}:", "{x[MEM_READ{>>customer>>Pfizer}:", "{>>>>>>>>}:"],
    ids=["two fields", "all given", "none given", "empty", "nested", "too many"],
)
def test_a_malformed_call_is_taken_back_and_the_text_stays_readable(model: Any, call: str) -> None:
    found, seen, out = said(model, f" They are [MEM_READ{call} here.", memory_of(model))
    assert found.split() == ["They", "are", "here.</s>"]
    assert "MEM_READ" not in seen
    assert out.memory_sources == [[[]]]


def test_calls_that_never_end_are_bounded(model: Any) -> None:
    found, seen, _ = said(model, f" They are [MEM_READ{{{'x' * 110}", memory_of(model), new=12)
    assert found.startswith("They are")
    assert "MEM_READ" not in found + seen
    found, seen, out = said(model, "[MEM_READ{Tia>>manager>>}:" * 10, memory_of(model))
    assert "MEM_READ" not in found
    assert len(out.memory_sources[0][0]) == RETLLMMechanism.most_calls


def test_a_read_without_a_match_gets_nothing(model: Any) -> None:
    found, seen, _ = said(model, "a[MEM_READ{Cyrus>>manager>>}:b", memory_of(model))
    assert found == "ab</s>"
    assert seen.endswith("a[MEM_READ{Cyrus>>manager>>}:b")


def test_a_field_that_nobody_wrote_is_exchanged(model: Any) -> None:
    near = wrapped(vectors="ngrams", planes=1, tables=8)
    _, seen, _ = said(near, "[MEM_READ{>>customers>>Pfizer}:", memory_of(near))
    assert ":{Cyrus>>customer>>Pfizer};{Tia>>customer>>Pfizer}" in seen
    _, seen, _ = said(model, "[MEM_READ{>>customer>>Pfizer Inc}:", memory_of(model))
    assert "MEM_READ" in seen


def test_calls_held_to_what_is_stored(model: Any) -> None:
    held = wrapped(constrained=True)
    found, seen, out = said(held, "a[MEM_READ{b", memory_of(held))
    assert found == "ab</s>"
    assert seen.partition("[MEM_READ{")[2].partition("}:")[0].count(">>") == 2
    assert len(out.memory_sources[0][0]) >= 1


def test_a_call_for_the_prompt(model: Any) -> None:
    first = wrapped(reads="prompt")
    _, seen, out = said(first, "x", memory_of(first))
    front = seen.partition("Who")[0]
    assert front.removeprefix("<s>").strip().split("\n")[0].strip(".") in {
        "Cyrus customer Pfizer", "Tia customer Pfizer", "Tia manager Ben",
    }  # fmt: skip
    assert len(out.memory_sources[0][0]) >= 1
    long = load_tokenizer()("word " * 450, return_tensors="pt")
    memory = memory_of(first)
    assert first(**long, memory=memory, output_sources=True).memory_sources == [[[]]], "there is no room for a call"


class TestWriting:
    @pytest.mark.parametrize(
        "text",
        ["[MEM_WRITE{a>>b>>c}", "[MEM_WRITE{a>>>>c}]", "[MEM_WRITE{a>>b}]", "[MEM_WRITE{a>>b>>[MEM_WRITE{c>>d>>e}]",
         write_call(("a", "b", "c" * 100_000)), write_call(("a", "b", "c" * 257))],
        ids=["unfinished", "empty", "short", "nested", "100 kB", "long"],
    )  # fmt: skip
    def test_a_call_that_is_none_is_refused_and_changes_nothing(self, model: Any, text: str) -> None:
        memory = memory_of(model)
        before = memory.states[0].entries()
        with pytest.raises(InputError, match="a write call must read"):
            memory.write(f"{text}\n", source="other")
        assert memory.states[0].entries() == before
        assert [source.name for source in memory.sources()] == ["list"]

    def test_a_triple_is_kept_once_for_a_source(self, model: Any) -> None:
        memory = memory_of(model)
        memory.write(LINES, source="list")
        assert len(memory.states[0].entries()) == 3
        memory.write(LINES, source="other")
        memory.forget("list")
        assert len(memory.states[0].entries()) == 3, "what two sources said is kept for the other"

    def test_what_is_told_again_is_new_where_the_newest_counts(self) -> None:
        newest = wrapped(newest=True)
        memory = memory_of(newest, "[MEM_WRITE{a>>b>>c}]")
        for last in "dcc":
            memory.write(f"[MEM_WRITE{{a>>b>>{last}}}]", source="list")
        assert [entry.fields[2] for entry in memory.states[0].entries()] == ["c", "d", "c"]
        _, seen, _ = said(newest, "[MEM_READ{a>>b>>}:", memory)
        assert seen.endswith(":{a>>b>>c}")

    def test_the_decoder_writes_calls_for_a_text(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def ask(self: Any, prompt: str, tokens: int, stop: Any = (), choices: Any = (), patience: int = 1) -> str:
            asked.append((prompt, tokens, stop))
            return f" {write_call(('Ada', 'owns', 'cat'))}{write_call(('Ada', 'x' * 300, 'y'))}[MEM_WRITE{{a>>b"

        monkeypatch.setattr("mplus.hf.text.ask.Asking.__call__", ask)
        memory = memory_of(model, "Ada has\na cat.")
        assert [entry.fields for entry in memory.states[0].entries()] == [("Ada", "owns", "cat")]
        assert asked[0][0].endswith("Text: Ada has a cat.\nCalls:")
        assert asked[0][2] == ("\n",)

    def test_a_decoder_that_was_not_trained_to_write_leaves_nothing(self, model: Any) -> None:
        assert memory_of(model, "Ada has a cat.").states[0].entries() == ()

    def test_text_without_calls_may_be_left_alone(self) -> None:
        assert memory_of(wrapped(writes="calls"), "Ada has a cat.").states[0].entries() == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": "best"}, "vectors must be where vectors come from"),
        ({"planes": 0}, "planes must be a whole number of at least 1"),
        ({"newest": 1}, "newest must be True or False"),
        ({"variant": "published"}, "variant"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrapped(**options)


def test_there_is_no_published_code() -> None:
    with pytest.raises(ConfigError, match="variant means nothing to the mechanism 'retllm'"):
        mplus.wrap(load_decoder(), {"mechanism": "retllm", "variant": "published"})


def test_the_readme_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code, shown = text.partition("```python\n")[2].split("\n```\n\n```text\n", 1)
    exec(code, {})
    assert capsys.readouterr().out == shown.partition("```")[0]
