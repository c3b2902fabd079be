"""``mplus demo --recall`` with an untrained decoder for the shipped one: what it tells, asks, counts and shows."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import attrs
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.cli.demo import recall
from mplus.cli.demo.recall import (
    ARMS,
    ROUNDS,
    UNTOLD,
    Answer,
    Asked,
    Chat,
    RecallDemo,
    converse,
    short_term_only,
    told_and_asked,
)
from mplus.cli.demo.render import NO_FIGURE, save_figure, show_recall
from mplus.errors import InputError, MissingDependencyError
from mplus.evaluation.reports.report import Report
from mplus.facts.episodes import recall_tokenizer
from mplus.facts.language import FILLERS, LAST_NAMES, UNKNOWN, VALUES, Language
from mplus.hf.pretrained import shipped
from tests.memory import tiny

LANGUAGE = Language()
K, N, K0, CHUNK = 4, 8, 4, 16
FACTS, DISTRACTION = 3, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder with memory and its tokenizer, laid out as the shipped ones are."""
    folder = tmp_path_factory.mktemp("recall")
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=len(LANGUAGE.vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        pad_token_id=0,
        eos_token_id=None,
    )
    config = mplus.MPlusConfig(
        chunk_tokens=CHUNK,
        min_chunk_tokens=8,
        memory_tokens_per_chunk=K,
        short_term_tokens=N,
        retrieved_tokens=K0,
        long_term_tokens=512,
        retriever={"name": "linear", "width": 8},
        adapters=None,
    )
    mplus.wrap(LlamaForCausalLM(base), config, check=False).save_pretrained(folder, save_base=True)
    recall_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def shipped_here(folder, monkeypatch):
    monkeypatch.setattr(shipped, "RECALL_TINY", folder)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def talk(folder):
    return Chat(*shipped.load_recall(), LANGUAGE, 0)


def demo(*options, **more):
    sizes = ("--facts", FACTS, "--distraction", DISTRACTION, "--streams", 2, "--threads", 1)
    return CliRunner().invoke(app, ["demo", "--recall", *map(str, (*sizes, *options))], **more)


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """JSON of a run, and its figure."""
    figure = tmp_path_factory.mktemp("figure") / "curves.svg"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "RECALL_TINY", folder)
        result = demo("--json", "--plot", figure)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), figure


def test_what_was_told_and_kept(ran):
    plain, _ = ran
    chunks = FACTS + DISTRACTION
    assert (plain["facts"], plain["chunks"], plain["tokens"]) == (FACTS, chunks, chunks * CHUNK)
    assert plain["long_term_rows"] == chunks * K - N
    assert plain["attended"] == 1 + K0 + N + 4
    assert plain["training_seconds"] is None
    model, _ = shipped.load_recall()
    assert plain["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert plain["seconds"] > 0


def test_facts_are_asked_for_and_so_are_some_that_were_never_told(ran):
    asked = ran[0]["asked"]
    told, untold = asked[:FACTS], asked[FACTS:]
    assert [one["told_as"] for one in told] == ["note 1", "note 2", "note 3"]
    assert [one["age"] for one in told] == [22, 21, 20]
    assert len(untold) == UNTOLD
    for one in untold:
        assert one["told_as"] is one["value"] is one["age"] is None
    for one in asked:
        fact = LANGUAGE.fact(one["answer"]["question"])
        assert LANGUAGE.held_out(fact), "people the decoder has never met"
        if one["value"] is not None:
            assert one["value"] in VALUES[LANGUAGE.relation(fact)]
        assert one["right"] == (one["answer"]["words"] == (one["value"] or "unknown"))
        assert one["short_term"]["source"] is one["short_term"]["age"] is None
        assert one["answer"]["source"].split()[0] in {"note", "chunk"}
    assert len({one["answer"]["question"] for one in asked}) == len(asked)


def test_the_curves_have_every_arm_and_no_age_beyond_what_is_told(ran):
    curves = ran[0]["curves"]
    assert {arm["name"] for arm in curves["arms"]} == set(ARMS)
    for arm in curves["arms"]:
        assert list(arm["accuracy_by_age"]) == ["0", "1", "2", "4", "8", "16"]
        assert set(arm["questions_by_age"].values()) == {2 * ROUNDS}
    assert curves["chance"] == pytest.approx(1 / 32)


def test_the_figure_is_written(ran):
    assert b"<svg" in ran[1].read_bytes()


def test_the_seed_decides_what_is_told(talk):
    def questions(seed):
        again = Chat(talk.model, talk._tokenizer, LANGUAGE, seed)
        return [one.answer.question for one in told_and_asked(again, 2, 3, seed)]

    assert questions(1) == questions(1) != questions(2)


def test_every_fact_is_in_its_chunk_and_the_untold_ones_are_in_none(talk, monkeypatch):
    chunks = {}
    write = talk.write

    def watched(chunk, source):
        chunks[source] = spoken(chunk)
        write(chunk, source)

    monkeypatch.setattr(talk, "write", watched)
    asked = told_and_asked(talk, FACTS, 5, seed=3)
    assert list(chunks) == ["note 1", "note 2", "note 3", *(f"chunk {place}" for place in range(4, 9))]
    assert [source.name for source in talk.memory.sources()] == list(chunks)
    for one in asked:
        if one.told_as is None:
            assert not any(one.answer.question in chunk for chunk in chunks.values())
        else:
            assert f"{one.answer.question} {one.value} ." in chunks[one.told_as]


def spoken(ids):
    return " ".join(LANGUAGE.vocabulary[i] for i in ids.tolist())


def told(talk, count):
    told_and_asked(talk, count, 0, seed=5)
    return talk


def test_an_answer_is_what_the_decoder_says_and_where_its_best_row_is_from(talk):
    told(talk, 6)
    question = "pet of ada abbott"
    ids = torch.tensor([[LANGUAGE.ids[word] for word in question.split()]])
    with torch.no_grad():
        last = talk.model(input_ids=ids, memory=talk.memory).logits[0, -1].softmax(-1)
    out = talk.model.generate(
        input_ids=ids, memory=talk.memory, max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
        output_sources=True,
    )  # fmt: skip
    best = max((row for layer in out.memory_sources[0] for row in layer), key=lambda row: row.score)
    answer = talk.ask("  Pet of ADA abbott ")
    assert answer.question == question
    assert answer.words == LANGUAGE.vocabulary[int(last.argmax())]
    assert answer.known == pytest.approx(1 - float(last[LANGUAGE.ids[UNKNOWN]]), abs=1e-6)
    assert (answer.source, answer.age) == (best.source, best.age // K)


def test_an_answer_of_two_words(talk):
    talk.language = Language(relations=5)
    assert len(told(talk, 3).ask("number of ada abbott").words.split()) == 2


def test_asking_leaves_the_memory_as_it_was(talk):
    told(talk, 5)
    before, version = talk.memory.fork(), talk.memory.version
    talk.ask("pet of ada abbott")
    talk.ask("pet of ada abbott", short_term_only(talk.memory))
    with pytest.raises(InputError, match="a question must be RELATION of FIRST LAST"):
        talk.ask("where is ada abbott")
    assert talk.memory.version == version
    tiny.assert_same(talk.memory, before)


def test_short_term_memory_alone(talk):
    told(talk, 6)
    without = short_term_only(talk.memory)
    for layer in range(2):
        assert without.stores[0].count(layer) == 0
        assert talk.memory.stores[0].count(layer) == 6 * K - N
        assert torch.equal(without.states[0].stm[layer].hidden, talk.memory.states[0].stm[layer].hidden)
    assert talk.ask("pet of ada abbott", without).source is None


def test_before_anything_is_forgotten_nothing_is_retrieved(talk):
    [asked] = told_and_asked(talk, 1, 0, seed=0)[:1]
    assert asked.answer.source is None
    assert asked.answer == asked.short_term


def scripted(lines):
    """``input`` that gives these lines, then ends or raises what stands for a line."""
    rest = iter(lines)

    def read(prompt):
        assert prompt == "> "
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


@pytest.mark.parametrize("end", ["", EOFError(), KeyboardInterrupt()])
def test_a_conversation(talk, end):
    said = []
    lines = [
        "colour of ada abbott red .",
        "  Colour of Ada Abbott green",
        "hello",
        "colour of ada nobody",
        "colour of ada abbott ?",
        "colour of ada abbott wine .",
        "colour of ada abbott.",
        end,
        "pet of ada abbott fox .",
    ]
    converse(talk, scripted(lines), said.append)
    help_text, *answers = said
    assert "colour, town, pet, fruit" in help_text
    assert answers[:2] == ["told.", "told."]
    assert all(answer.startswith("a question must be RELATION of FIRST LAST") for answer in answers[2:4])
    assert answers[5].startswith("a fact must end in a colour, such as amber or white, got 'wine'")
    expected = talk.ask("colour of ada abbott")
    for answer in (answers[4], answers[6]):
        assert answer == f"{expected.words}   (known: {expected.known:.2f}; best row: -)"
    assert len(answers) == 7, "nothing is read after the end"
    assert [source.name for source in talk.memory.sources()] == ["you 1", "you 2"]


def test_a_conversation_says_where_the_best_row_is_from(talk):
    facts = [f"pet of ada {last} fox ." for last in LAST_NAMES[:5]]
    said = []
    converse(talk, scripted([*facts, "pet of ada abbott"]), said.append)
    answer = talk.ask("pet of ada abbott")
    assert answer.source.startswith("you ")
    assert said[-1].endswith(f"best row: {answer.source}, {answer.age} chunks ago)")


def test_told_facts_are_laid_out_as_in_training(talk, monkeypatch):
    chunks = []
    monkeypatch.setattr(talk, "write", lambda chunk, source: chunks.append(chunk))
    talk.tell("town of emma fisher paris .", "you 1")
    text = spoken(chunks[0]).split()
    assert len(text) == CHUNK
    assert " ".join(text[1:7]) == "town of emma fisher paris ."
    assert {text[0], *text[7:]} <= set(FILLERS)


def test_talking_after_the_demo(tmp_path):
    lines = "colour of ada abbott red .\nnonsense\n\n"
    result = demo("--talk", "--plot", tmp_path / "curves.png", input=lines)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "(comes with mplus) was told 3 facts, then 20 others, 368 tokens in all" in text
    assert f"Each layer keeps {23 * K - N} long-term rows" in text
    assert "question told as ago right M+ STM only row from known" in text
    assert "accuracy over age in chunks (recall)" in text
    assert "memory.retriever" not in text, "settings have room in the JSON"
    assert text.index("Tell a fact") < text.index("> told.") < text.index("> a question must be")
    assert (tmp_path / "curves.png").stat().st_size > 0


def answered(said, source="note 1", known=0.75):
    return Answer("colour of ada abbott", said, source, 9, known)


def report_of(*asked, **changes):
    facts = {
        "parameters": 12345,
        "training_seconds": None,
        "facts": 2,
        "chunks": 12,
        "tokens": 192,
        "long_term_rows": 40,
        "attended": 17,
        "curves": Report(protocol="recall", arms=()),
        "seed": 0,
        "threads": 1,
        "seconds": 7.4,
    }
    return RecallDemo(**{**facts, **changes}, asked=list(asked))


def shown(report, figure=None):
    console = Console(file=io.StringIO(), width=160, highlight=False)
    show_recall(report, figure, console)
    return console.file.getvalue()


RIGHT = Asked(told_as="note 1", value="red", age=9, answer=answered("red"), short_term=answered("green", None))
WRONG = Asked(told_as="note 2", value="blue", age=8, answer=answered("red"), short_term=answered("blue", None))
REJECTED = Asked(told_as=None, value=None, age=None, answer=answered("unknown", None, 0.1), short_term=answered("red"))
INVENTED = Asked(told_as=None, value=None, age=None, answer=answered("red"), short_term=answered("unknown"))


def test_what_counts_as_right():
    assert [one.right for one in (RIGHT, WRONG, REJECTED, INVENTED)] == [True, False, True, False]
    said_unknown = attrs.evolve(RIGHT, answer=answered("unknown"))
    assert not said_unknown.right


def test_the_table_says_what_was_asked_and_answered(tmp_path):
    text = shown(report_of(RIGHT, WRONG, REJECTED, INVENTED), tmp_path / "figure.png")
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "colour of ada abbott note 1 9 red red green note 1 0.75" in rows
    assert "colour of ada abbott note 2 8 blue red blue note 1 0.75" in rows
    assert "colour of ada abbott never - unknown unknown red - 0.10" in rows
    assert "colour of ada abbott never - unknown red unknown note 1 0.75" in rows
    assert "Right: 1 of 2 told, 1 of 2 never told" in text
    assert "12,345 parameters (comes with mplus)" in text
    assert "an answer attends to 17 rows and tokens" in text
    assert f"Figure: {tmp_path / 'figure.png'}" in text.replace("\n", "")
    assert "7 seconds in all" in text
    assert "(trained here in 95 s)" in shown(report_of(RIGHT, training_seconds=95.2))


def test_without_matplotlib_there_is_no_figure_and_a_hint(monkeypatch, tmp_path):
    def missing(module, purpose):
        raise MissingDependencyError(f"{purpose} needs {module}")

    monkeypatch.setattr("mplus.evaluation.reports.plots.require_extra", missing)
    report = report_of(RIGHT)
    assert save_figure(report, tmp_path / "figure.png") is None
    assert NO_FIGURE in " ".join(shown(report).split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "figure.jpg"), "must be written to a path ending in .png or .svg, got figure.jpg"),
        (("--plot", "nowhere/figure.png"), "--plot must be a file in a folder that is there, got nowhere/figure.png"),
        (("--facts", 0), "--facts"),
        (("--facts", 33), "--facts"),
        (("--distraction", 5001), "--distraction"),
        (("--streams", 0), "--streams"),
    ],
)
def test_bad_options_are_refused_before_the_work(options, message, monkeypatch):
    monkeypatch.setattr(recall, "load_recall", None)
    result = demo(*options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_training_in_front_of_the_user(monkeypatch, tmp_path):
    asked_for = []

    def train(recipe, **options):
        asked_for.append((recipe, options))
        model, tokenizer = shipped.load_recall()
        return SimpleNamespace(model=model.train(), tokenizer=tokenizer)

    monkeypatch.setattr("mplus.training.train", train, raising=False)
    result = demo("--train", "--seed", 4, "--json", "--plot", tmp_path / "curves.svg")
    assert result.exit_code == 0, result.output
    assert asked_for == [("recall-tiny", {"seed": 4, "progress": False})]
    assert json.loads(result.stdout)["training_seconds"] > 0
