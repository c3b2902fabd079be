"""``mplus chat`` with lines from a pipe: answers, commands, errors, Ctrl-C, and the memory the next time."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mplus
from mplus.chat import Recalled
from mplus.cli import app
from mplus.cli.chat.talk import Talk, ago, described
from mplus.hf.pretrained import chat_model
from mplus.hf.pretrained.shipped import RECALL_TINY, STORIES260K
from tests.chat.conftest import TEMPLATE, chat, memory, model, tokenizer  # noqa: F401 - fixtures

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):  # noqa: F811 - a fixture
    """A chat model: the decoder that comes with mplus, with a template."""
    folder = tmp_path_factory.mktemp("model") / "stories"
    shutil.copytree(STORIES260K, folder)
    tokenizer.save_pretrained(folder)
    return folder


def talk(*options, lines):
    typed = "".join(f"{line}\n" for line in lines)
    result = CliRunner().invoke(app, ["chat", *map(str, options), "--threads", "1"], input=typed)
    return result, [" ".join(line.split()) for line in result.stdout.splitlines() if line.strip()]


def test_what_was_said_is_known_the_next_time(folder, tmp_path):
    options = (folder, "--memory", tmp_path / "memory", "--mechanism", "notes", "--max-tokens", 4)
    result, said = talk(*options, lines=["Tom has a red ball.", "", "/sources", "Who are you?"])
    assert result.exit_code == 0, result.output
    assert said[0] == "0 sources in memory. /help lists the commands."
    assert any(line.startswith("chat 20") and line.endswith("in the prompt") for line in said)
    assert not any("from memory" in line for line in said)
    result, said = talk(*options, lines=["/sources", "Who has a red ball?", "/quit", "never read"])
    assert said[0] == "1 source in memory. /help lists the commands.", "a question alone is not remembered"
    name = next(line for line in said if line.startswith("chat 20"))[: len("chat 2026-01-01 00:00:00")]
    assert any(line.startswith(f"from memory: {name}") for line in said)
    result, said = talk(*options, "--remember", "both", lines=[f"/forget {name}", "/forget nothing", "/sources"])
    assert result.exit_code == 0
    assert f"forgotten: {name}" in said
    assert any("nothing" in line for line in said)
    result, said = talk(*options, lines=["/sources"])
    assert not any(line.startswith(name) for line in said)


def test_commands(folder, tmp_path):
    (tmp_path / "book.txt").write_text("Sue ate a green pear. " * 3, encoding="utf-8")
    lines = ["/help", f"/read {tmp_path / 'book.txt'}", f"/read {tmp_path / 'none.txt'}", "/wrong"]
    lines += ["What did Sue eat?", "/off", "What did Sue eat?", "/on", "What did Sue eat?"]
    result, said = talk(folder, "--mechanism", "notes", "--max-tokens", 4, lines=lines)
    assert result.exit_code == 0, result.output
    text = "\n".join(said)
    assert "/forget NAME" in text
    assert "tokens of book.txt are in memory" in text
    assert "needs a text file" in text
    assert "a command must be one of" in text
    answers = text.partition("/quit, got '/wrong'")[2]
    before, _, rest = answers.partition("memory off")
    off, _, on = rest.partition("memory on")
    assert ["book.txt" in part for part in (before, off, on)] == [True, False, True]
    result, said = talk(folder, "--mechanism", "notes", lines=[lines[1], "/search pear", "/search xyzzy", "/search"])
    assert any("Sue ate a green pear." in line and line.endswith("(book.txt)") for line in said)
    assert "nothing" in said
    assert any("takes a text" in line for line in said)


def test_ctrl_c_ends_the_answer_and_nothing_else(chat, monkeypatch):  # noqa: F811
    lines = iter(["One day", "And then?"])

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    console = Console(file=io.StringIO(), width=100, highlight=False)
    talk = Talk(chat, console, read)
    out, raised = console.out, []

    def interrupted(*args, **kwargs):
        out(*args, **kwargs)
        if not raised:
            raised.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(console, "out", interrupted)
    talk.run()
    assert "(interrupted)" in console.file.getvalue()
    first, second = chat.exchanges
    assert (first.turns[0].content, second.turns[0].content) == ("One day", "And then?")


def test_ctrl_c_at_the_prompt_stays(chat):  # noqa: F811
    given = iter([KeyboardInterrupt(), "/quit"])

    def read(prompt):
        line = next(given)
        if isinstance(line, BaseException):
            raise line
        return line

    console = Console(file=io.StringIO(), width=100, highlight=False)
    Talk(chat, console, read).run()
    assert "Ctrl-D leaves" in console.file.getvalue()


def test_no_model_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLUS_CACHE", str(tmp_path))
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mplus.download.index_urls", lambda: ["file:///nowhere"])
    for options in ([], [str(tmp_path / "nothing")]):
        result, _ = talk(*options, lines=[])
        assert result.exit_code == 2
        assert chat_model.WAYS in " ".join(result.stderr.split())


def test_a_model_without_a_template(folder, tmp_path):
    result, _ = talk(STORIES260K, lines=[])
    assert result.exit_code == 2
    assert "chat template" in result.stderr
    result, said = talk(STORIES260K, "--plain", "--mechanism", "notes", "--max-tokens", 3, lines=["Hello"])
    assert result.exit_code == 0, result.output
    assert len(said) > 1


def test_a_model_with_its_own_memory_keeps_it():
    decoder, _ = chat_model.load_chat_model(str(RECALL_TINY))
    assert chat_model.with_memory(decoder, None) is decoder
    assert chat_model.with_memory(decoder, "mplus") is decoder
    for given in (("kv", None), ("mplus", 2)):
        with pytest.raises(mplus.errors.ConfigError, match="was saved with a memory of the mechanism 'mplus'"):
            chat_model.with_memory(decoder, *given)


def test_pieces_are_an_option_of_mechanisms_that_have_some(model):  # noqa: F811
    with pytest.raises(mplus.errors.ConfigError, match="--pieces goes with the mechanisms kv, notes"):
        chat_model.with_memory(object(), "mplus", 2)
    found = chat_model.with_memory(chat_model.load_chat_model(str(STORIES260K))[0], "kv", 3)
    assert found.mplus_engine.mechanism.options.retrieved_chunks == 3


def test_what_was_recalled_in_a_line():
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    assert [ago(now - timedelta(**{unit: 2.5})) for unit in ("seconds", "minutes", "hours", "days")] == [
        "just now", "2 minutes ago", "2 hours ago", "2 days ago",
    ]  # fmt: skip
    mail = Recalled(source="mail", written=now - timedelta(hours=1, minutes=3), score=1.234, rows=20)
    assert described([mail, Recalled(source=None)]) == "mail (1 hour ago, 20 tokens, score 1.23); (no name)"
