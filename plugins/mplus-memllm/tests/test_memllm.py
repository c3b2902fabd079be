"""MemLLM writes triples, is asked for them while a text is generated, and keeps to what was computed of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import mplus_memllm.calls
import mplus_memllm.player
import mplus_memllm.store
import pytest
import torch
from mplus_memllm import MemLLMMechanism, write_call
from mplus_memllm.writing import names_in, sentences_of, written_from_vocabulary

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
    implementation = MemLLMMechanism

    def text(self, seed: int) -> str:
        name, _, _, thing, _, _, place = super().text(seed).rstrip(".").split()
        return write_call([(name, thing, place)])

    def traces(self, text: str) -> dict[str, bytes]:
        return {"its first field": text.partition("-->")[2].partition(">>")[0].encode()}


@pytest.mark.nightly
class TestCallsForPrompts(TestConformance):
    options: ClassVar[dict[str, Any]] = {"reads": "prompt"}

    def test_another_decoder_reads_the_same(self, model: Any, tmp_path: Path) -> None:
        """Another decoder has the same memory; which call it makes for a prompt is its own choice."""
        memory = self.written(model, 1, 2)
        memory.save(tmp_path / "saved")
        with self.wrapped(torch.float32) as other:
            assert self.differences(self.loaded(tmp_path / "saved", other), memory) == []


@pytest.mark.nightly
class TestPublished(TestConformance):
    settings: ClassVar[dict[str, Any]] = {"variant": "published"}


def test_installed_under_its_name() -> None:
    assert MECHANISMS.get("memllm") is MemLLMMechanism


# ---------------------------------------------------------------- the cases


def test_every_case_is_computed_as_recorded() -> None:
    [report] = replay(GOLDENS)
    assert report.passed(), report
    assert (report.steps, report.skipped, report.tolerance) == (26, {}, 1e-6)
    assert report.worst < 1e-8


P, S, C = mplus_memllm.player, mplus_memllm.store, mplus_memllm.calls
LATE = P.LateStopping


class WithoutPrompt(LATE):  # type: ignore[misc, valid-type]
    """Divides by the generated tokens alone."""

    def __init__(self, prompt: int, patience: int) -> None:
        super().__init__(1, patience)


class AtTheFirst(LATE):  # type: ignore[misc, valid-type]
    def __init__(self, prompt: int, patience: int) -> None:
        super().__init__(prompt, 1)


class GoesOnWithTheMark(LATE):  # type: ignore[misc, valid-type]
    def step(self, closing: float, other: float) -> bool:
        found: bool = super().step(closing, other)
        self._total += max(closing - other, 0.0)
        return found


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "items divided by commas": (C, "ITEMS", ","),
    "parts of other lengths count": (
        P,
        "triples_in",
        lambda text: [[*one, "", "", ""][:3] for one in parts_of(text)],
    ),
    "the first arrow": (P, "triples_in", lambda text: C.triples_in(text.replace("-->", "--", 1))),
    "the third field is kept": (P, "queries_in", lambda body, **o: [tuple(one.split(">>")) for one in body.split(";")]),
    "short parts are left out": (P, "queries_in", lambda body, **o: C.queries_in(body, **o) or []),
    "never strict": (P, "queries_in", lambda body, **o: C.queries_in(body, strict=False)),
    "always strict": (P, "queries_in", lambda body, **o: C.queries_in(body, strict=True)),
    "results repeated": (P, "results_of", lambda names, most: ";".join(names[:most])),
    "all results": (P, "results_of", lambda names, most: C.results_of(names, 99)),
    "results stay in the context": (
        P,
        "without_calls",
        lambda text: text.replace("({MEM_READ(Maria>>residence>>)-->", ""),
    ),
    "no closing mark": (P, "resumed", lambda *given: C.resumed(*given).removesuffix("})")),
    "results are trained": (P, "trained_in_read", lambda tokens: [False, False] + [True] * (len(tokens) - 2)),
    "the prompt is trained": (P, "trained_in_write", lambda tokens: [True] * len(tokens)),
    "relations are not compared": (S, "RELATIONS", 0),
    "triples twice": (S.Tables, "of", staticmethod(lambda rows: S.Tables(tuple(map(tuple, rows)), (), ()))),
    "the distance of one name": (S, "normalize", lambda vectors, dim: vectors * 0.5),
    "late stopping without the prompt": (P, "LateStopping", WithoutPrompt),
    "early stopping": (P, "LateStopping", AtTheFirst),
    "goes on with the mark": (P, "LateStopping", GoesOnWithTheMark),
}


def parts_of(text: str) -> list[list[str]]:
    return [part.split(">>") for part in text.rsplit("-->", maxsplit=1)[-1].split("})", maxsplit=1)[0].split(";")]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_replay(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    [report] = replay(GOLDENS)
    assert not report.passed()


VECTORS = {
    "Apple": [1.0, 0.0], "Apple Inc": [0.96, 0.28], "Pear": [0.0, 1.0], "founder": [1.0, 0.0], "founded by": [0.8, 0.6],
}  # fmt: skip


def found(rows: list[tuple[str, str, str]], query: Any, exact: bool, *thresholds: float) -> list[tuple[float, int]]:
    """Scores and numbers of what a query finds."""
    tables = S.Tables.of(rows)

    def vectors(names: Any) -> torch.Tensor:
        return torch.tensor([VECTORS.get(name, [0.0, -1.0]) for name in names])

    matches = tables.query(query, vectors, S.Thresholds(*thresholds), exact_wins=exact)
    return [(round(match.score, 6), match.row) for match in matches]


def test_near_names_are_found_best_first_and_exact_ones_win() -> None:
    rows = [("Apple Inc", "founder", "Wozniak"), ("Apple", "founder", "Jobs"), ("Apple", "founded by", "Wayne")]
    query = ("Apple", "founder", None)
    assert found(rows, query, False, 0.1, 0.3, 0.2) == [(0.0, 1), (0.02, 0), (0.1, 2)]
    assert found(rows, query, False, 0.1, 0.3, 0.1) == [(0.0, 1), (0.02, 0)], "below, not at the threshold"
    assert found(rows, query, True, 0.1, 0.3, 0.2) == [(0.0, 1)]
    assert found(rows[:1], query, True, 0.1, 0.3, 0.2) == [(0.02, 0)]
    assert found([], query, True, 0.1, 0.3, 0.2) == []
    many = [("Apple", "founder", str(number)) for number in range(40)]
    assert len(found(many, query, True, 0.1, 0.1, 0.1)) == 31


# ---------------------------------------------------------------- with a decoder


FACTS = [("Maria", "residence", "Lisbon"), ("Ben", "residence", "Oslo"), ("Ben", "employer", "Pfizer")]


@pytest.fixture(scope="module")
def model() -> Any:
    return wrapped()


def wrapped(variant: str = "paper", **options: Any) -> Any:
    return mplus.wrap(load_decoder(), {"variant": variant, "mechanism": {"name": "memllm", **options}})


def memory_of(model: Any, text: str | None = None) -> Any:
    memory = model.new_memory(tokenizer=load_tokenizer())
    memory.write(write_call(FACTS) if text is None else text, source="list")
    return memory


def said(model: Any, text: str, memory: Any, new: int = 150) -> tuple[str, str, Any]:
    """What comes back behind the prompt, and what the decoder saw at the end, when it says ``text``; the output."""
    tokenizer = load_tokenizer()
    script = Script([*encoded(tokenizer, text, inside=True), END], END)
    ids = tokenizer("Who?", return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, memory=memory, logits_processor=[script], output_sources=True, return_dict_in_generate=True,
        max_new_tokens=new, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    return tokenizer.decode(out.sequences[0, ids.shape[1] :]), tokenizer.decode(script.seen[-1]), out


def test_a_read_is_answered_and_the_next_one_drives_it_out(model: Any) -> None:
    told, seen, out = said(model, "She is in ({MEM_READ(Maria>>residence>>)-->Lisbon now.", memory_of(model))
    assert told == "She is in Lisbon now.</s>"
    assert "She is in ({MEM_READ(Maria>>residence>>)-->Lisbon})Lisbon" in seen
    assert [(one.source, one.score) for one in out.memory_sources[0][0]] == [("list", pytest.approx(1.0, abs=1e-6))]
    two = "1({MEM_READ(Maria>>residence>>)-->2({MEM_READ(>>residence>>Oslo;Ben>>employer>>)-->3"
    told, seen, _ = said(model, two, memory_of(model))
    assert told == "123</s>"
    assert seen.endswith("12({MEM_READ(>>residence>>Oslo;Ben>>employer>>)-->Ben;Pfizer})3")


@pytest.mark.parametrize(
    "call",
    ["MEM_READ(Maria>>residence)", "MEM_READ(Maria>>residence>>Lisbon)", "MEM_READ()", "MEM_READ(>>>>Oslo)", "nothing",
     "MEM_READ(Maria>>residence>>", "MEM_WRITE", "MEM_READ(Maria>>({MEM_READ(Maria>>residence>>)",
     "MEM_READ(Eve>>residence>>)"],
    ids=["short", "full", "empty", "empty field", "no call", "no bracket", "a write", "nested", "no result"],
)  # fmt: skip
def test_a_malformed_call_is_taken_back_and_the_text_stays_readable(model: Any, call: str) -> None:
    told, seen, out = said(model, f" She is ({{{call}--> here.", memory_of(model))
    assert told.split() == ["She", "is", "here.</s>"]
    assert "MEM_" not in seen
    assert out.memory_sources == [[[]]]


def test_calls_that_never_end_are_bounded(model: Any) -> None:
    told, seen, _ = said(model, f" She is ({{MEM_READ({'x' * 140}", memory_of(model), new=12)
    assert told.startswith("She is")
    assert "MEM_READ" not in told + seen
    same = "({MEM_READ(Maria>>residence>>)-->"
    told, _, out = said(model, f"a{same}b{same}c", memory_of(model))
    assert (told, len(out.memory_sources[0][0])) == ("abc</s>", 1), "the same call again is taken back"
    other = "({MEM_READ(Ben>>residence>>)-->"
    told, _, out = said(model, (same + other) * 5, memory_of(model))
    assert "MEM_READ" not in told
    assert len(out.memory_sources[0][0]) <= MemLLMMechanism.most_calls


def test_as_released_a_full_triple_is_a_query_and_empty_fields_are_asked(model: Any) -> None:
    published = wrapped("published")
    _, seen, _ = said(published, "({MEM_READ(Maria>>residence>>Porto)-->", memory_of(published))
    assert seen.endswith("-->Lisbon})")
    many = "\n".join(write_call([(f"n{number}", "kind", "x")]) for number in range(40))
    for one, results in ((model, None), (published, 30)):
        _, seen, _ = said(one, "({MEM_READ(>>kind>>x)-->", memory_of(one, many))
        assert seen.count(";") == (results or 1) - 1
        assert ("MEM_READ" in seen) is (results is not None)


def test_near_names_are_found_by_the_vectors_of_the_option(model: Any) -> None:
    call = "({MEM_READ(maria>>Residences>>)-->"
    near = wrapped(relation_distance=0.5, score=0.5)
    assert said(near, call, memory_of(near))[1].endswith("-->Lisbon})")
    assert "MEM_READ" not in said(model, call, memory_of(model))[1]


def test_calls_held_to_what_is_stored() -> None:
    held = wrapped(constrained=True)
    told, seen, out = said(held, "a({b", memory_of(held))
    assert told == "ab</s>"
    assert seen.partition("({")[2].split("})")[0] in {
        *(f"MEM_READ({s}>>{r}>>)-->{o}" for s, r, o in FACTS), *(f"MEM_READ(>>{r}>>{o})-->{s}" for s, r, o in FACTS),
    }  # fmt: skip
    assert len(out.memory_sources[0][0]) == 1


def test_a_call_for_the_prompt() -> None:
    first = wrapped(reads="prompt")
    _, seen, out = said(first, "x", memory_of(first))
    lines = {f"{s} {r}: {o}." for s, r, o in FACTS}
    assert seen.partition("Who?")[0].removeprefix("<s>").strip().split("\n")[0] in lines
    assert len(out.memory_sources[0][0]) == 1
    long = load_tokenizer()("word " * 450, return_tensors="pt")
    assert first(**long, memory=memory_of(first), output_sources=True).memory_sources == [[[]]], "there is no room"


class Says:
    """Stands in for a decoder: says one thing after the other, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, prompt: str, tokens: int, **options: Any) -> str:
        self.asked.append((prompt, options))
        said = self.answers[len(self.asked) - 1]
        assert not options.get("choices") or said in options["choices"]
        return said

    def count(self, text: str) -> int:
        return len(text.split())


class TestWriting:
    @pytest.mark.parametrize(
        "text",
        ["({MEM_WRITE-->a>>r>>b", "({MEM_WRITE-->a>>r})", "({MEM_WRITE-->a>>>>b})", "({MEM_WRITE a>>r>>b})",
         "({MEM_WRITE-->a>>r>>({MEM_WRITE-->c>>r>>d})", write_call([("a", "r", "b" * 100_000)]),
         write_call([("a", "r", "b" * 257)])],
        ids=["unfinished", "two fields", "empty field", "no arrow", "nested", "100 kB", "long"],
    )  # fmt: skip
    def test_a_call_that_is_none_is_refused_and_changes_nothing(self, model: Any, text: str) -> None:
        memory = memory_of(model)
        before = memory.states[0].entries()
        with pytest.raises(InputError, match="a write call must read"):
            memory.write(f"{text}\n", source="other")
        assert memory.states[0].entries() == before
        assert [source.name for source in memory.sources()] == ["list"]

    def test_a_call_may_be_empty_and_a_triple_is_kept_once_for_a_source(self, model: Any) -> None:
        memory = memory_of(model, "({MEM_WRITE-->})")
        assert memory.states[0].entries() == ()
        memory = memory_of(model)
        memory.write(write_call(FACTS), source="list")
        memory.write(write_call(FACTS), source="other")
        assert len(memory.states[0].entries()) == 6
        assert said(model, "({MEM_READ(Maria>>residence>>)-->", memory)[1].endswith("-->Lisbon})")
        memory.forget("list")
        assert len(memory.states[0].entries()) == 3, "what two sources said is kept for the other"

    def test_the_decoder_is_shown_one_sentence_behind_the_others(self, model: Any) -> None:
        says = Says("({MEM_WRITE-->Maria>>residence>>Lisbon;x>>>>y;" + f"a>>r>>{'b' * 300}", "({MEM_WRITE-->", "Hm.")
        mechanism = model.mplus_engine.mechanism
        found = mechanism.write([], "Maria lives in Lisbon. She works. It rains.", "Once. Twice.", says)
        assert found == [("Maria", "residence", "Lisbon")]
        assert [prompt for prompt, _ in says.asked] == [
            "Once. Twice.({USER_ST})Maria lives in Lisbon.({USER_END})",
            "Once. Twice. Maria lives in Lisbon.({USER_ST})She works.({USER_END})",
            "Once. Twice. Maria lives in Lisbon. She works.({USER_ST})It rains.({USER_END})",
        ]
        assert says.asked[0][1] == {"stop": ("})",), "patience": 5}
        lenient = wrapped("published").mplus_engine.mechanism
        assert ("x", "", "y") in lenient.write([], "Maria lives in Lisbon.", "", Says(says.answers[0]))

    def test_a_vocabulary_holds_what_is_written(self) -> None:
        text, names = "Maria lives in Lisbon and Ben in Oslo.", ["residence", "country"]
        says = Says("Maria>>residence>>Lisbon;", "Ben>>residence>>Oslo})")
        assert written_from_vocabulary(text, names, says, 10_000) == [FACTS[0], FACTS[1]]
        first, second = (options["choices"] for _, options in says.asked)
        assert (len(first), len(second)) == (1 + 12 * 4, 1 + 10 * 4), "a pair of names has one relation"
        assert says.asked[1][0].endswith(f"({{USER_ST}}){text}({{USER_END}})({{MEM_WRITE-->Maria>>residence>>Lisbon;")
        assert written_from_vocabulary("Maria is in Lisbon.", names, Says("Maria>>country>>Lisbon;"), 10_000) == [
            ("Maria", "country", "Lisbon")
        ]
        assert written_from_vocabulary("Maria lives in Lisbon.", ["residence"], Says("})"), 10_000) == []
        assert written_from_vocabulary("It rains.", ["residence"], Says(), 10_000) == []
        assert written_from_vocabulary("Maria lives in Lisbon.", ["residence"], Says(), 10) == []

    def test_a_decoder_that_was_not_trained_writes_within_a_vocabulary(self, model: Any) -> None:
        assert memory_of(model, "Maria lives in Lisbon.").states[0].entries() == ()
        held = wrapped(relations=["residence", "employer"])
        for entry in memory_of(held, "Maria lives in Lisbon.").states[0].entries():
            assert {entry.fields[0], entry.fields[2]} == {"Maria", "Lisbon"}
            assert entry.fields[1] in {"residence", "employer"}
        assert memory_of(wrapped(writes="calls"), "Maria lives in Lisbon.").states[0].entries() == ()

    def test_names_and_sentences(self) -> None:
        assert names_in("The Bank of England met Maria Keller in 1976, and she left.") == [
            "Bank of England", "Maria Keller", "1976",
        ]  # fmt: skip
        assert sentences_of("One is. Two?\nthree e.g. this") == ["One is.", "Two?", "three e.g. this"]


def test_the_query_uses_a_triple_told_twice_once() -> None:
    assert S.Tables.of([*FACTS, FACTS[0]]).triples == tuple(FACTS)
    assert math.isclose(S.EXACT, 0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": "best"}, "vectors must be where vectors come from"),
        ({"relations": ["a>>b"]}, "relations must be a list of texts"),
        ({"relations": [""]}, "relations must be a list of texts"),
        ({"patience": 0}, "patience must be a whole number of at least 1"),
        ({"reads": "never"}, "reads must be one of 'calls', 'prompt'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrapped(**options)


def test_the_readme_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code, shown = text.partition("```python\n")[2].split("\n```\n\n```text\n", 1)
    exec(code, {})
    assert capsys.readouterr().out == shown.partition("```")[0]
