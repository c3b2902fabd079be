"""Text that is too short for a chunk waits, durably, until there is enough of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve

import mplus
from mplus.errors import InputError, LiveMemoryError, NonFiniteError, WriteTogetherError
from mplus.memory import Memory
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.verify import verify
from mplus.memory.writing.chunking import cut_with_tail
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.two_computations

MODEL = tiny.variant("paper")
SHORT = tiny.ids(3, 1)


def held(memory: Memory) -> dict[str | None, tuple[int, int, int]]:
    """Tokens, chunks and waiting tokens of every source."""
    return {info.name: (info.tokens, info.chunks, info.tail_tokens) for info in memory.sources()}


def waiting(memory: Memory, name: str | None = None, row: int = 0) -> list[int]:
    return memory.states[row].waiting(name).tolist()


def rows_of(memory: Memory, name: str) -> float:
    return sum(next(info for info in memory.sources() if info.name == name).held.values())


# ---------------------------------------------------------------------- cutting


@pytest.mark.parametrize(
    ("before", "texts", "chunks", "rest"),
    [
        (0, [3], [], 3),
        (3, [3], [], 6),
        (3, [20], [16, 7], 0),
        (6, [20], [6, 16, 4], 0),
        (14, [3], [14], 3),
        (13, [3], [16], 0),
        (6, [3, 40, 3], [9, 16, 16, 8], 3),
    ],
)
def test_what_waits_goes_in_front(before: int, texts: list[int], chunks: list[int], rest: int) -> None:
    """Chunks of 4 to 16 tokens, and texts from 4 tokens on are written at once."""
    sizes = {"chunk_tokens": 16, "min_chunk_tokens": 4, "shortest_text": 4}
    whole = torch.arange(before + sum(texts))
    found, left = cut_with_tail(whole[:before], whole[before:].split(texts), **sizes)
    assert [len(chunk) for chunk in found] == chunks
    assert len(left) == rest
    assert torch.equal(torch.cat([*found, left]), whole)


def test_every_cut_keeps_its_sizes_and_its_order() -> None:
    generator = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(300):
        chunk = number(1, 12)
        least = number(1, chunk)
        shortest = number(least, chunk)
        lengths = [number(1, 20) for _ in range(number(1, 5))]
        before = number(0, chunk - 1)
        whole = torch.arange(before + sum(lengths))
        chunks, rest = cut_with_tail(
            whole[:before], whole[before:].split(lengths),
            chunk_tokens=chunk, min_chunk_tokens=least, shortest_text=shortest,
        )  # fmt: skip
        assert torch.equal(torch.cat([*chunks, rest]), whole)
        assert len(rest) < chunk
        assert all(least <= len(one) <= chunk for one in chunks)


# ---------------------------------------------------------------------- waiting and being written


def test_a_short_text_waits_and_costs_no_rows() -> None:
    memory = MODEL.new_memory()
    memory.write(tiny.ids(40), source="book")
    before = memory.nbytes
    report = memory.write(SHORT, source="chat")
    assert (report.tokens, report.chunks, report.tail_tokens) == ([3], [0], [3])
    assert held(memory) == {"book": (40, 3, 0), "chat": (3, 0, 3)}
    assert rows_of(memory, "chat") == 0
    assert memory.nbytes == before + 12
    assert "3 text tokens waiting" in repr(memory)
    memory.write(tiny.ids(3, 2), source="chat")
    assert waiting(memory, "chat") == [*SHORT.tolist(), *tiny.ids(3, 2).tolist()]


def test_a_full_tail_is_written_and_a_long_text_takes_it_along() -> None:
    memory, whole = MODEL.new_memory(keep_text=True), MODEL.new_memory(keep_text=True)
    parts = tiny.ids(16, 3).split(2)
    reports = [memory.write(part, source="chat") for part in parts]
    assert [report.chunks for report in reports] == [[0]] * 7 + [[1]]
    assert sum(report.tokens[0] for report in reports) == 16
    whole.write(tiny.ids(16, 3), source="chat")
    memory.write(SHORT, source="chat")
    report = memory.write(tiny.ids(30, 4), source="chat")
    assert (report.tokens, report.chunks, report.tail_tokens) == ([30], [3], [0])
    whole.write(torch.cat([SHORT, tiny.ids(30, 4)]), source="chat")
    tiny.assert_same(memory, whole)


def test_a_text_of_less_than_k_tokens_waits_too_but_not_in_the_variant_published() -> None:
    sizes = {"min_chunk_tokens": 2, "short_term_tokens": 24, "memory_tokens_per_chunk": 8}
    assert tiny.build(**sizes).mplus_engine.mechanism.shortest_text == 8
    published = tiny.build(**{**tiny.VARIANTS["published"], **sizes})
    assert published.mplus_engine.mechanism.shortest_text == 2


def test_flush_writes_every_source_and_no_row_of_another() -> None:
    memory = MODEL.new_memory(batch_size=2, keep_text=True)
    memory.write([tiny.ids(16), None], source="book")
    memory.write([SHORT, SHORT[:1]], source="a")
    memory.write([SHORT[:2], None], source="b")
    report = memory.flush()
    assert (report.tokens, report.chunks) == ([5, 1], [2, 1])
    assert held(memory) == {"book": (16, 1, 0), "a": (3, 1, 0), "b": (2, 1, 0)}
    assert (rows_of(memory, "a"), rows_of(memory, "b"), rows_of(memory, "book")) == (3, 2, tiny.K)
    version = memory.version
    assert memory.flush().chunks == [0, 0]
    assert memory.version == version, "where nothing waits nothing is done"
    memory.forget("b", mode="rebuild")
    assert held(memory) == {"book": (16, 1, 0), "a": (3, 1, 0)}
    plain = MODEL.new_memory(batch_size=2, keep_text=True)
    plain.write([tiny.ids(16), None], source="book")
    plain.write([SHORT, SHORT[:1]], source="a")
    plain.flush()
    tiny.assert_same(memory, plain)


def test_what_has_waited_longest_makes_room() -> None:
    """All sources together wait with at most a chunk, which is what a read has to look at."""
    memory = MODEL.new_memory()
    reports = [memory.write(SHORT, source=f"user {number}") for number in range(7)]
    assert [report.chunks[0] for report in reports] == [0] * 5 + [1, 1]
    assert [name for name, (_, _, tokens) in held(memory).items() if tokens] == [f"user {n}" for n in range(2, 7)]
    memory.write(SHORT[:1], source="user 2")
    memory.write(SHORT, source="user 7")
    assert waiting(memory, "user 2") == [*SHORT.tolist(), int(SHORT[0])], "it was told of last"
    assert held(memory)["user 3"] == (3, 1, 0)
    assert sum(tokens for _, _, tokens in held(memory).values()) <= tiny.CHUNK


def test_many_memories_at_once() -> None:
    memories = [MODEL.new_memory() for _ in range(3)]
    reports = mplus.write_together(memories, [tiny.ids(40), SHORT, tiny.ids(16)])
    assert [report.chunks for report in reports] == [[3], [0], [1]]
    with pytest.raises(WriteTogetherError) as caught:
        mplus.write_together(memories, [SHORT, "", SHORT])
    assert list(caught.value.errors) == [1]
    assert [memory.states[0].tail_tokens for memory in memories] == [3, 3, 3]


def test_a_document_in_pieces_is_cut_behind_what_waits() -> None:
    document, ways = tiny.ids(75, 7), []
    for before in (0, 3, 9):
        memory, whole = MODEL.new_memory(keep_text=True), MODEL.new_memory(keep_text=True)
        for part in tiny.ids(before, 8).split(3) if before else ():
            memory.write(part)
            whole.write(part)
        memory.write_pieces(document.split(5))
        whole.write(document)
        tiny.assert_same(memory, whole)
        ways.append(held(memory)[None])
    assert ways == [(75, 5, 0), (78, 5, 0), (84, 6, 0)]
    memory.write_pieces([SHORT[:1], SHORT[1:]])
    assert waiting(memory) == SHORT.tolist()
    with pytest.raises(InputError, match="nothing to write"):
        memory.write_pieces(["", torch.empty(0, dtype=torch.int64)])


def test_a_mechanism_without_a_tail_writes_a_short_text_at_once() -> None:
    memory = tiny.build(mechanism="kv", memory_rows="auto", retrieved_tokens=32, adapters=None, **KV).new_memory()
    report = memory.write(SHORT, source="chat")
    assert (report.tokens, report.chunks, report.tail_tokens) == ([3], [1], [0])
    with pytest.raises(InputError, match="nothing to write"):
        memory.write([])


KV: dict[str, Any] = {
    "min_chunk_tokens": None,
    "memory_tokens_per_chunk": None,
    "short_term_tokens": None,
    "retriever": "linear",
    "long_term_tokens": None,
}


# ---------------------------------------------------------------------- errors


def test_a_write_that_fails_leaves_what_waited_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MODEL.new_memory(keep_text=True)
    memory.write(SHORT, source="a")
    before, version = tiny.content(memory), memory.version
    for wrong in (torch.tensor([tiny.VOCAB_SIZE]), "text without a tokenizer", [], [1.5]):
        with pytest.raises(InputError):
            memory.write(wrong, source="a")
    own = MODEL.mplus_engine.write

    def broken(*given: Any) -> Any:
        made = own(*given)
        return evolve(made, hidden=tuple(float("nan") * rows for rows in made.hidden))

    with monkeypatch.context() as patch:
        patch.setattr(MODEL.mplus_engine, "write", broken)
        for fails in (lambda: memory.write(tiny.ids(30), source="a"), memory.flush):
            with pytest.raises(NonFiniteError):
                fails()
    tiny.assert_content(memory, before)
    assert memory.version == version
    assert waiting(memory, "a") == SHORT.tolist()
    memory.write(tiny.ids(30), source="a")
    assert held(memory) == {"a": (33, 3, 0)}


# ---------------------------------------------------------------------- a life


def test_it_is_forgotten_with_its_source_and_copied_with_its_memory() -> None:
    memory = MODEL.new_memory(keep_text=True)
    memory.write(SHORT, source="a")
    fork = memory.fork()
    memory.write(SHORT[:2], source="b")
    assert memory.forget("a", keep_name=True).tokens == 3
    assert held(memory) == {"b": (2, 0, 2)}
    assert memory.forgotten() == ["a"]
    assert held(fork) == {"a": (3, 0, 3)}
    assert waiting(fork.to(torch.float64), "a") == waiting(fork.select([0, 0]), "a", 1) == SHORT.tolist()
    fork.write(tiny.ids(20), source="c")
    fork.forget("c", mode="rebuild")
    assert held(fork) == {"a": (3, 0, 3)}
    memory.reset()
    assert memory.states[0].tail == ()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    memory = MODEL.new_memory(batch_size=2, keep_text=True)
    memory.write([tiny.ids(20), SHORT], source="a")
    memory.write([SHORT[:2], None], source="b")
    memory.flush()
    memory.write([SHORT, None], source="b")
    memory.save(tmp_path)
    again = Memory.load(tmp_path, MODEL)
    tiny.assert_same(again, memory)
    assert [text.short for text in again.states[0].texts.chunks()] == [False, False, True]
    assert [[info.tail_tokens for info in row] for row in saved_sources(tmp_path)] == [[0, 3], [0]]
    for one in (again, memory):
        one.write([tiny.ids(20, 3), SHORT], source="b")
    tiny.assert_same(again, memory)


def test_it_lives_in_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    memory = Memory.open(path, MODEL)
    memory.write(tiny.ids(20), source="book")
    memory.write(SHORT, source="a")
    memory.write(SHORT[:2], source="b")
    killed = Memory.open(path, MODEL, read_only=True)  # as after a crash: from the checkpoint and the journal
    tiny.assert_same(killed, memory)
    assert waiting(killed, "a") == SHORT.tolist()
    assert [info.tail_tokens for info in saved_sources(path)[0]] == [0, 3, 2]
    with pytest.raises(LiveMemoryError, match="read_only"):
        killed.flush()
    memory.checkpoint()
    tiny.assert_same(Memory.open(path, MODEL, read_only=True), memory)
    with pytest.raises(RuntimeError), memory:
        raise RuntimeError("in the middle of things")
    assert forget_saved(path, "b").tokens == 2
    memory = Memory.open(path, MODEL)
    assert held(memory) == {"book": (20, 2, 0), "a": (3, 0, 3)}, "what failed had nothing written in a hurry"
    memory.close()
    memory.close()
    assert verify(path) == []
    again = Memory.open(path, MODEL, read_only=True)
    assert held(again) == {"book": (20, 2, 0), "a": (3, 1, 0)}, "at close it was"
