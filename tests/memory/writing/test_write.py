"""From text to chunks to rows: what ``Memory.write`` accepts, how it cuts, and what it reports."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mplus.errors import InputError
from mplus.memory.writing.chunking import split
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations


@pytest.fixture
def memory() -> Memory:
    return tiny.variant("paper").new_memory()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The ids of every write pass."""
    engine, seen = tiny.variant("paper").mplus_engine, []
    own = engine.write

    def listen(views: Any, ids: Tensor, *rest: Any) -> Any:
        seen.append(ids)
        return own(views, ids, *rest)

    monkeypatch.setattr(engine, "write", listen)
    return seen


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, "w7" being 7; with special tokens it begins with 1."""
    words = {f"w{number}": number for number in range(tiny.VOCAB_SIZE)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert made("w5").input_ids == [1, 5]
    return made


# ---------------------------------------------------------------------- cutting


@given(n=st.integers(0, 200), chunk=st.integers(1, 20), data=st.data())
def test_chunks_cover_the_ids_within_bounds_or_cannot(n: int, chunk: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, chunk))
    ids = torch.arange(n)
    if not any(pieces * least <= n <= pieces * chunk for pieces in range(1, n + 1)):
        with pytest.raises(InputError):
            split(ids, chunk, least)
        return
    chunks = split(ids, chunk, least)
    lengths = [len(piece) for piece in chunks]
    assert torch.equal(torch.cat(chunks), ids)
    assert all(least <= length <= chunk for length in lengths)
    assert len(chunks) == -(-n // chunk), "no more passes than needed"
    assert lengths == sorted(lengths, reverse=True), "full ones first"


def test_a_short_tail_shares_with_its_neighbour_only() -> None:
    assert [len(piece) for piece in split(torch.arange(35), 16, 4)] == [16, 10, 9]
    assert [len(piece) for piece in split(torch.arange(36), 16, 4)] == [16, 16, 4]
    assert [len(piece) for piece in split(torch.arange(25), 10, 8)] == [9, 8, 8], "here it takes both others"


def test_what_cannot_be_cut_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"at least min_chunk_tokens \(4\) tokens, got 3: join it"):
        split(tiny.ids(3), 16, 4)
    with pytest.raises(InputError, match=r"11 tokens cannot be cut into chunks .* \(8 to 10\).*lower min_chunk_tokens"):
        split(torch.arange(11), 10, 8)


def test_the_decoder_reads_the_chunks_in_order(memory: Memory, passes: list[Tensor]) -> None:
    ids = tiny.ids(35)
    report = memory.write(ids)
    assert [list(chunk.shape) for chunk in passes] == [[1, 16], [1, 10], [1, 9]]
    assert torch.equal(torch.cat(passes, 1)[0], ids)
    assert (report.chunks, report.tokens) == ([3], [35])


# ---------------------------------------------------------------------- kinds of input


def test_all_ways_to_give_ids_are_one() -> None:
    ids = tiny.ids(40)
    ways: list[Any] = [
        ids,
        ids[None],
        ids.tolist(),
        [ids.tolist()],
        [ids],
        ids.int(),
        tuple(ids.tolist()),
        ids.to(torch.uint8),
    ]
    memories = [tiny.variant("paper").new_memory() for _ in ways]
    for memory, way in zip(memories, ways, strict=True):
        memory.write(way)
        tiny.assert_same(memory, memories[0])


def test_text_is_its_ids_without_special_tokens() -> None:
    ids = tiny.ids(40)
    words = " ".join(f"w{number}" for number in ids.tolist())
    model = tiny.variant("paper")
    one, other = model.new_memory(tokenizer=tokenizer()), model.new_memory()
    one.write(words, source="a")
    other.write(ids, source="a")
    tiny.assert_same(one, other)


def test_a_batch_of_texts_of_unequal_length() -> None:
    model, sizes = tiny.variant("paper"), [40, 7, 23]
    together = model.new_memory(batch_size=3, tokenizer=tokenizer(), seed=5)
    rows = [tiny.ids(size, size) for size in sizes]
    report = together.write([" ".join(f"w{number}" for number in ids.tolist()) for ids in rows])
    assert report.tokens == sizes
    assert report.chunks == [3, 1, 2]
    for row, ids in enumerate(rows):
        alone = model.new_memory(seed=5 + row)
        alone.write(ids)
        mine, theirs = tiny.content(alone), tiny.content(together)
        for name, value in mine.items():
            other = theirs[f"{row}{name[1:]}"]
            if name.endswith(("hidden", "key")):
                torch.testing.assert_close(value, other, atol=tiny.rounding(), rtol=0)
            else:
                assert tiny.difference({"x": value}, {"x": other}) == []


@pytest.mark.parametrize("nothing", ["", "  ", None, [], torch.empty(0, dtype=torch.int64)], ids=repr)
def test_an_empty_row_is_skipped(nothing: Any) -> None:
    model = tiny.variant("paper")
    memory = model.new_memory(batch_size=3, tokenizer=tokenizer())
    before = tiny.content(memory)
    report = memory.write([tiny.ids(20), nothing, tiny.ids(30)], source=["a", "b", "c"])
    assert (report.tokens, report.chunks) == ([20, 0, 30], [2, 0, 2])
    assert memory.sources(1) == []
    after = tiny.content(memory)
    assert {name.split(".")[0] for name in tiny.difference(before, after)} == {"0", "2"}


def test_rows_that_hold_equally_many_rows_share_a_pass(passes: list[Tensor]) -> None:
    memory = tiny.variant("paper").new_memory(batch_size=3)
    memory.write([tiny.ids(48), tiny.ids(16), None])
    memory.write([tiny.ids(16), tiny.ids(16), tiny.ids(16)])
    assert [len(ids) for ids in passes] == [2, 1, 1, 1, 1, 1]


# ---------------------------------------------------------------------- reports and sources


def test_the_report_counts(memory: Memory) -> None:
    reports = [memory.write(tiny.ids(16 * chunks, chunks), source="a") for chunks in (1, 2, 3, 10)]
    assert [report.tokens for report in reports] == [[16], [32], [48], [160]]
    assert [report.chunks for report in reports] == [[1], [2], [3], [10]]
    # Three chunks fill the STM; from then on each drops four rows, and beyond forty they leave the LTM as well.
    assert [report.dropped_rows for report in reports] == [[0], [0], [12], [40]]
    assert [report.evicted_rows for report in reports] == [[0], [0], [0], [12]]
    assert all(report.seconds > 0 and report.tokens_per_second > 0 for report in reports)
    assert memory.version == 16


def test_sources_count_what_was_written_and_what_is_left(memory: Memory) -> None:
    memory.write(tiny.ids(32), source="a")
    memory.write(tiny.ids(16), source="b")
    memory.write(tiny.ids(16))
    memory.write(tiny.ids(20), source="a")
    found = {source.name: source for source in memory.sources()}
    assert [source.name for source in memory.sources()] == ["a", "b", None]
    assert (found["a"].tokens, found["a"].chunks, found[None].tokens) == (52, 4, 16)
    kept = sum(source.held["short-term"] + source.held["long-term"] for source in found.values())
    assert kept == memory.states[0].clock == 24
    assert sum(source.held["short-term"] for source in found.values()) == tiny.N


def test_one_source_for_each_row() -> None:
    memory = tiny.variant("paper").new_memory(batch_size=2)
    memory.write(tiny.prompts(2, 20), source=["a", None])
    memory.write_chunk(tiny.prompts(2, 10), source="b")
    assert [[source.name for source in memory.sources(row)] for row in (0, 1)] == [["a", "b"], [None, "b"]]


def test_write_chunk_is_one_pass(passes: list[Tensor]) -> None:
    model = tiny.variant("paper")
    one, other = model.new_memory(batch_size=2), model.new_memory(batch_size=2)
    report = one.write_chunk(tiny.prompts(2, 16), source="a")
    assert [list(ids.shape) for ids in passes] == [[2, 16]]
    other.write(tiny.prompts(2, 16), source="a")
    tiny.assert_same(one, other)
    assert (report.tokens, report.chunks) == ([16, 16], [1, 1])


# ---------------------------------------------------------------------- progress


@pytest.mark.parametrize(("flag", "terminal", "chunks", "shown"), [
    (True, False, 1, True),
    (False, True, 20, False),
    (None, True, 20, True),
    (None, True, 3, False),
    (None, False, 20, False),
])  # fmt: skip
def test_the_progress_bar(
    flag: bool | None, terminal: bool, chunks: int, shown: bool, memory: Memory, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    memory.write(tiny.ids(16 * chunks), progress=flag)
    told = capsys.readouterr()
    assert told.out == ""
    assert ("writing" in told.err) == shown
    if shown:
        assert f"{16 * chunks}/{16 * chunks}" in told.err
