"""``mplus demo-novel`` on the beginning of the novel: its numbers agree with each other and with what it saved."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import cattrs
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mplus.cli import app
from mplus.cli.demo import novel
from mplus.cli.demo.novel import STORY_TOKENS, demo_config, read_novel, retrieved_from, tell, tokenize, with_memory
from mplus.cli.demo.novel import write_novel as write
from mplus.cli.demo.render import show_novel
from mplus.cli.demo.report import DemoReport
from mplus.hf.pretrained.shipped import chapters, load_decoder, load_tokenizer
from mplus.hf.reading.reading import RetrievedSource
from mplus.memory.format.manifest import read_manifest
from mplus.memory.format.offline import saved_tables
from mplus.memory.format.verify import verify

pytestmark = pytest.mark.nightly  # what people are shown first is `mplus demo`

TOKENS = 6_000  # all of the first chapter, some of the second; more rows than the STM holds and a read retrieves


def run(*options):
    return CliRunner().invoke(app, ["demo-novel", *map(str, options)])


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def plain(folder):
    before = torch.get_num_threads()
    result = run("--tokens", TOKENS, "--json", "--out", folder)
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def report(plain):
    return cattrs.structure(plain, DemoReport)


def shown(report, kept=False):
    console = Console(file=io.StringIO(), width=160, highlight=False)
    show_novel(report, kept, console)
    return console.file.getvalue()


def test_counts(report):
    config = demo_config()
    assert report.tokens == TOKENS
    assert report.chapters == 2
    assert report.chunks == sum(-(-len(ids) // config.chunk_tokens) for _, ids in texts())
    written = report.chunks * config.memory_tokens_per_chunk
    assert len(report.layers) == 5
    for layer in report.layers:
        assert layer.held["short-term"] == config.short_term_tokens
        assert layer.held["pending"] == 0
        assert layer.long_term == written - config.short_term_tokens
        assert layer.retrieved == config.retrieved_tokens
        assert 0 <= layer.newest_age <= layer.median_age <= layer.oldest_age < written
    row = 4 * (64 + 32) + 3 * 8
    assert report.bytes >= 5 * (written - config.short_term_tokens) * row


def test_where_rows_came_from(report):
    sources = report.story.sources
    assert sum(source.rows for source in sources) == sum(layer.retrieved for layer in report.layers)
    assert {source.source for source in sources} == {name for name, _ in texts()}
    assert [source.rows for source in sources] == sorted((source.rows for source in sources), reverse=True)
    assert min(source.newest_age for source in sources) == min(layer.newest_age for layer in report.layers)
    assert max(source.oldest_age for source in sources) == max(layer.oldest_age for layer in report.layers)
    by_name = {source.source: source for source in sources}
    first, second = (by_name[name] for name, _ in texts())
    assert first.newest_age > second.oldest_age


def test_memory_and_text_stay_within_the_positions_of_the_decoder(report):
    places, config = report.positions, report.config
    assert places.trained == 512
    assert places.layout == "sequential"
    assert places.writing == 1 + config["memory_tokens_per_chunk"] + config["chunk_tokens"] <= places.trained
    memory = 1 + config["retrieved_tokens"] + config["short_term_tokens"]
    assert places.reading == memory + config["chunk_tokens"] <= places.trained
    prompt = len(load_tokenizer()(report.story.prompt)["input_ids"])
    assert memory + prompt + STORY_TOKENS + novel.CONTINUATION_TOKENS <= places.trained


def test_speeds(plain, report):
    assert report.write.tokens == report.tokens
    assert 0 < report.read.tokens <= report.tokens
    assert report.read.tokens % report.config["chunk_tokens"] in {0, report.tokens % report.config["chunk_tokens"]}
    for work in ("write", "read"):
        timing = plain[work]
        assert timing["tokens_per_second"] * timing["seconds"] == pytest.approx(timing["tokens"])
        assert timing["base_tokens_per_second"] * timing["base_seconds"] == pytest.approx(timing["tokens"])
        assert 0 < timing["seconds"] + timing["base_seconds"] < report.seconds


def test_memory_changes_the_story(report):
    assert report.story.with_memory.strip()
    assert report.story.without_memory.strip()
    assert report.story.with_memory != report.story.without_memory


def test_the_continuation_is_identical_in_a_new_process(plain, report):
    saved = plain["saved"]
    assert saved["identical"] is True
    assert saved["here"] == saved["in_new_process"]
    assert len(saved["here"]["tokens"]) == novel.CONTINUATION_TOKENS
    births = report.saved.here.births
    clock = (report.chunks + 1) * report.config["memory_tokens_per_chunk"]
    assert len(births) == 5
    assert all(len(layer) == 128 and layer[-1] == clock - 1 for layer in births)
    assert len(set(births)) > 1  # every layer draws for itself, so equal births mean equal draws


def test_what_is_kept(plain, folder):
    saved = folder / novel.MEMORY
    assert plain["saved"]["folder"] == str(folder)
    assert plain["saved"]["bytes"] == sum(file.stat().st_size for file in saved.iterdir())
    assert verify(saved) == []
    _, [sources] = saved_tables(saved)  # as they were before the story was written
    assert sum(source.tokens for source in sources) == TOKENS
    assert [source.name for source in sources] == [name for name, _ in texts()]


def test_the_screen_says_what_the_numbers_say(report):
    text = " ".join(shown(report).split())
    assert "has not yet been trained to use its memory" in text
    assert "6,000 tokens: 2 chapters" in text
    assert f"128 short-term, 0 pending, {report.layers[0].long_term:,} long-term rows per layer" in text
    assert "sequential: a write takes up to 289, a read up to 481 of the 512" in text
    assert "identical continuation: yes (48 of 48 tokens equal, the same rows in short-term memory)" in text
    assert f"writing {report.write.tokens_per_second:,.0f} {report.write.base_tokens_per_second:,.0f}" in text
    for source in report.story.sources:
        assert f"{source.rows} {source.source} {source.newest_age:,} {source.oldest_age:,}" in text
    for number, layer in enumerate(report.layers):
        assert f"{number} 96 {layer.newest_age:,} {layer.median_age:,} {layer.oldest_age:,}" in text
    assert "kept in" not in text
    assert f"mplus memory show {report.saved.folder}/memory" in shown(report, kept=True)


def test_a_different_continuation_is_reported_and_fails(monkeypatch):
    def other(folder, threads):
        told = novel.continue_saved(folder)
        return cattrs.structure({**cattrs.unstructure(told), "tokens": [0, *told.tokens[1:]]}, type(told))

    monkeypatch.setattr(novel, "_in_new_process", other)
    result = run("--tokens", 512)
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "identical continuation: no (47 of 48 tokens equal, the same rows in short-term memory)" in text
    assert "Nothing was retrieved: all rows are still in short-term memory." in text


@pytest.fixture
def in_this_process(monkeypatch):
    """Run what would be run in a new process here, without importing everything once more."""

    def run(command, **_):
        assert command[:3] == [sys.executable, "-m", "mplus.cli"]
        result = CliRunner().invoke(app, command[3:])
        return subprocess.CompletedProcess(command, result.exit_code, result.stdout, result.stderr)

    monkeypatch.setattr(novel.subprocess, "run", run)


@pytest.mark.usefixtures("in_this_process")
def test_a_process_that_fails_ends_the_demo_with_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(novel, "continue_saved", lambda folder: read_manifest(folder / "nothing"))
    result = run("--tokens", 512, "--out", tmp_path)
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("mplus: ")]
    assert "it ended with exit code 2" in line
    assert f"{tmp_path / 'nothing' / 'manifest.json'} is missing" in line


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mplus.cli.demo.novel.write_novel", None)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "letter.txt").write_text("keep me")
    result = run("--out", tmp_path)
    assert result.exit_code == 2
    assert "letter.txt" in result.stderr
    file = tmp_path / "file"
    file.write_text("")
    assert run("--out", file).exit_code == 2


def texts(limit=TOKENS):
    return tokenize(chapters(), load_tokenizer(), limit)


def told_with(seed):
    """The story and where rows came from, for one seed."""
    tokenizer, base = load_tokenizer(), load_decoder()
    model = with_memory(load_decoder(), seed)
    memory = model.new_memory(tokenizer=tokenizer, seed=seed)
    write(base, memory, texts(3_000))
    return tell(base, model, memory, tokenizer)


def test_the_seed_decides_everything_that_is_drawn():
    before = torch.random.get_rng_state()
    once, again, other = told_with(0), told_with(0), told_with(1)
    assert once == again
    assert once[2] != other[2]
    assert once[0].without_memory == other[0].without_memory
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reading_measures_the_same_chunks_with_memory_and_without():
    seen = {"memory": [], "alone": []}

    def decoder(kind):
        return lambda input_ids, memory=None, **_: seen[kind].append((input_ids.tolist(), memory is not None))

    model = with_memory(load_decoder(), 0)
    memory = model.new_memory()
    ids = torch.arange(256 * 40) % 500
    timing = read_novel(decoder("alone"), decoder("memory"), memory, ids)
    assert [ids for ids, _ in seen["memory"]] == [ids for ids, _ in seen["alone"]]
    assert all(with_it for _, with_it in seen["memory"])
    assert not any(with_it for _, with_it in seen["alone"])
    assert len(seen["memory"]) == 16
    assert timing.tokens == 16 * 256


def test_rows_are_counted_by_source():
    rows = [RetrievedSource(0, "b", 7, 0.5), RetrievedSource(1, "a", 3, 0.5), RetrievedSource(1, "b", 9, None)]
    b, a = retrieved_from(rows)
    assert (b.source, b.rows, b.newest_age, b.oldest_age) == ("b", 2, 7, 9)
    assert (a.source, a.rows, a.newest_age, a.oldest_age) == ("a", 1, 3, 3)
    assert retrieved_from([]) == ()
