"""A memory on disk is made anew for a decoder that cannot read it, from the text that it keeps."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import InputError, LiveMemoryError, MemoryFileError, MemoryMismatchError
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.memory import Memory
from mplus.memory.format.verify import verify
from mplus.memory.migration import rewrite as rewriting
from tests.helpers.clock import NOON, Hands
from tests.mechanisms.kv.memories import decoder as byte_decoder
from tests.mechanisms.kv.memories import tokenizer as byte_tokenizer
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KV = {"mechanism": "kv", "chunk_tokens": 32, "retrieved_tokens": 64}
MPLUS = {"chunk_tokens": 32, "memory_tokens_per_chunk": 8, "short_term_tokens": 24, "retrieved_tokens": 16}
KEY, TOM = "The key is under the blue stone in the garden.", "Tom has a small boat and sails it on the lake."
LONG = "Once upon a time Lily went to the park. She saw a big dog. The dog was sad. " * 4


@functools.cache
def words() -> Any:
    return load_tokenizer()


@functools.cache
def old_model() -> Any:
    """The trained decoder that is shipped, and its memories of keys and values."""
    return mplus.wrap(load_decoder(), KV)


@functools.cache
def next_model() -> Any:
    """The next release of it: other weights."""
    decoder = load_decoder()
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(1.01)
    return mplus.wrap(decoder, KV)


@functools.cache
def foreign_model() -> Any:
    """A decoder of another size, with bytes for tokens."""
    return mplus.wrap(byte_decoder(), {**KV, "chunk_tokens": 64})


def tell(memory: Memory, clock: Hands) -> Memory:
    """Sources of one text, of two, with a write id and without, one that is pinned, expires, or was forgotten."""
    memory.write(LONG, source="story")
    clock.move(hours=1)
    memory.write(KEY, source="notes", write_id="n1")
    memory.write("It rained.", source="gone")
    memory.write(TOM, source="notes", write_id="n2", expires=timedelta(days=9))
    clock.move(hours=1)
    memory.write("A short one.", source="soon", expires=timedelta(hours=5))
    memory.write(TOM + " " + KEY, source=None, write_id="n3")
    memory.forget("gone", keep_name=True)
    memory.pin("notes")
    return memory


def facts(memory: Memory) -> list[Any]:
    return [
        (info.name, info.written, info.last_written, info.expires, info.pinned, "".join(memory.text(info.name).split()))
        for info in memory.sources()
    ]


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(params=["saved", "live"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Hands]]:
    clock, path = Hands(), tmp_path / "old"
    if request.param == "live":
        tell(Memory.open(path, old_model(), tokenizer=words(), clock=clock), clock).close()
    else:
        tell(old_model().new_memory(tokenizer=words(), clock=clock), clock).save(path)
    before = files(path)
    yield path, clock
    assert files(path) == before, "it is only read"


class TestKeysAndValues:
    def test_other_weights(self, old: tuple[Path, Hands], tmp_path: Path) -> None:
        """The new memory is what it would be had the same been written with the new decoder."""
        path, clock = old
        expected = tell(next_model().new_memory(tokenizer=words(), clock=(own := Hands())), own)
        new = mplus.rewrite_memory(
            path, next_model(), tmp_path / "new", tokenizer=words(), old_tokenizer=words(), clock=clock
        )
        assert facts(new) == facts(expected)
        assert new.forgotten() == ["gone"]
        for layer in range(3):
            one, other = (m.stores[0].gather(layer, m.stores[0].ids(layer)).projected for m in (new, expected))
            assert torch.equal(one, other)
        lengths = [memory.states[0].chunk_length.tolist() for memory in (new, expected)]
        assert lengths[0] == lengths[1]
        assert {record.write_id for record in new.states[0].writes} == {"n1", "n2", "n3"}
        version = new.version
        assert new.write(KEY, source="notes", write_id="n1").chunks == [1]
        assert new.version == version
        assert new.search("Where is the key?")[0].source in ("notes", None)
        new.close()
        assert verify(tmp_path / "new") == []
        assert not (tmp_path / "new.rewriting").exists()
        assert [file.name for file in (tmp_path / "new").iterdir() if "manifest" in file.name] == ["manifest.json"]

    def test_another_tokenizer(self, old: tuple[Path, Hands], tmp_path: Path) -> None:
        path, clock = old
        read = functools.partial(Memory.open, read_only=True) if (path / "lock").exists() else Memory.load
        memory = read(path, old_model(), tokenizer=words(), clock=clock)
        for to in (None, tmp_path / "new"):
            new = mplus.rewrite_memory(
                path, foreign_model(), to, tokenizer=byte_tokenizer(), old_tokenizer=words(), clock=clock
            )
            assert sorted(facts(new), key=str) == sorted(facts(memory), key=str)
            assert new.forgotten() == ["gone"]
            version = new.version
            for write_id, text, source in (("n1", KEY, "notes"), ("n2", TOM, "notes"), ("n3", f"{TOM} {KEY}", None)):
                new.write(text, source=source, write_id=write_id)
            assert new.version == version, "every write is known again"
            assert {record.write_id for record in new.states[0].writes} == {"n1", "n2", "n3"}
            assert [info.chunks for info in new.sources() if info.name == "notes"] == [2], "two texts stay two"
            new.close()

    def test_texts_that_are_not_known_apart(self, tmp_path: Path) -> None:
        """Chunks that were cut from one text are one text again, short ones by themselves are not joined."""
        memory = old_model().new_memory(tokenizer=words())
        for text in (LONG, KEY, TOM):
            memory.write(text, source="a")
        memory.save(tmp_path / "old")
        new = mplus.rewrite_memory(tmp_path / "old", foreign_model(), tokenizer=byte_tokenizer(), old_tokenizer=words())
        ids = new.states[0].token_ids.split(new.states[0].chunk_length.tolist())
        chunks = [byte_tokenizer().decode(part).strip() for part in ids]
        assert chunks[-2:] == [KEY, TOM]
        assert all(chunk.startswith(("Once", "She", "The dog")) for chunk in chunks[:-2])

    def test_after_the_vocabulary_has_grown(self, tmp_path: Path) -> None:
        model, clock = mplus.wrap(load_decoder(), KV), Hands()
        memory = tell(model.new_memory(tokenizer=words(), clock=clock), clock)
        before = facts(memory)
        memory.save(tmp_path / "old")
        model.resize_token_embeddings(520)
        with pytest.raises(MemoryMismatchError, match=r"with memory.rewrite\(\)"):
            memory.write("More.")
        memory.rewrite()
        assert facts(memory) == before
        with pytest.raises(InputError, match="does not say of which tokenizer: pass old_tokenizer="):
            mplus.rewrite_memory(tmp_path / "old", model, tokenizer=words())
        new = mplus.rewrite_memory(tmp_path / "old", model, tokenizer=words(), old_tokenizer=words(), clock=clock)
        assert facts(new) == before
        assert new.states[0].token_ids.tolist() == memory.states[0].token_ids.tolist()
        model.resize_token_embeddings(40)
        with pytest.raises(InputError, match="ids must lie in the vocabulary, 0 to 39"):
            mplus.rewrite_memory(tmp_path / "old", model, tokenizer=words(), old_tokenizer=words())


class TestRows:
    def test_what_keeps_its_text(self, tmp_path: Path) -> None:
        """M+ of the same decoder: bit for bit what ``Memory.rewrite`` gives, what waits included."""
        model, clock = tiny.variant("paper"), Hands()
        memory = model.new_memory(seed=5, keep_text=True, clock=clock)
        for turn in range(3):
            memory.write(tiny.ids(60, turn), source=f"s{turn % 2}")
            clock.move(hours=1)
        memory.write(tiny.ids(2, 3), source="s0")
        memory.save(tmp_path / "old")
        new = mplus.rewrite_memory(tmp_path / "old", model, tmp_path / "new", clock=clock)
        memory.rewrite()
        assert new.sources() == memory.sources()
        found, expected = tiny.content(new), tiny.content(memory)
        assert set(tiny.difference(found, expected)) <= {"0.sources"}, "but for numbers"
        assert [part.ids.tolist() for part in new.states[0].tail] == [tiny.ids(2, 3).tolist()]

    def test_every_batch_row(self, tmp_path: Path) -> None:
        model = tiny.variant("paper")
        memory = model.new_memory(batch_size=2, keep_text=True)
        memory.write([tiny.ids(40, 1), tiny.ids(20, 2)], source="a")
        memory.write([None, tiny.ids(20, 3)], source="b")
        memory.save(tmp_path / "old")
        new = mplus.rewrite_memory(tmp_path / "old", model)
        for mine, old in zip(new.states, memory.states, strict=True):
            assert [text.ids.tolist() for text in mine.texts.chunks()] == [t.ids.tolist() for t in old.texts.chunks()]
            assert [source.name for source in mine.sources] == [source.name for source in old.sources]

    def test_after_the_vocabulary_has_grown(self, tmp_path: Path) -> None:
        model = mplus.wrap(load_decoder(), MPLUS)
        memory = model.new_memory(tokenizer=words(), keep_text=True)
        memory.write(LONG, source="story")
        memory.save(tmp_path / "old")
        model.resize_token_embeddings(520)
        with pytest.raises(MemoryMismatchError, match="base is"):
            Memory.load(tmp_path / "old", model)
        new = mplus.rewrite_memory(tmp_path / "old", model, tokenizer=words(), old_tokenizer=words())
        memory.write(KEY * 2, source="key")
        new.write(KEY * 2, source="key")
        assert new.text("story") == memory.text("story")
        assert new.states[0].texts is not None

    def test_to_another_mechanism_and_tokenizer(self, tmp_path: Path) -> None:
        memory = tiny_mplus(tmp_path / "old")
        new = mplus.rewrite_memory(tmp_path / "old", foreign_model(), tokenizer=byte_tokenizer(), old_tokenizer=words())
        assert new.text("story").split() == memory.text("story").split()

    def test_without_text_the_sources_are_named(self, tmp_path: Path) -> None:
        memory = tiny.written("paper", [60])
        memory.save(tmp_path / "old")
        with pytest.raises(InputError, match=r"keeps no text .* batch row 0 \('first', 'zweite Quelle'\)"):
            mplus.rewrite_memory(tmp_path / "old", tiny.variant("paper"))


def tiny_mplus(path: Path) -> Memory:
    memory: Memory = mplus.wrap(load_decoder(), MPLUS).new_memory(tokenizer=words(), keep_text=True)
    memory.write(LONG, source="story")
    memory.save(path)
    return memory


class TestText:
    def test_notes_become_chunks(self, tmp_path: Path) -> None:
        memory = mplus.wrap(load_decoder(), {"mechanism": "notes"}).new_memory(tokenizer=words())
        memory.write(KEY, source="key")
        memory.write(TOM, source="tom")
        memory.save(tmp_path / "old")
        new = mplus.rewrite_memory(tmp_path / "old", old_model(), tokenizer=words())
        assert new.search("Where is the key?")[0].source == "key"
        assert [info.name for info in new.sources()] == ["key", "tom"]

    def test_notes_fit_every_decoder(self, tmp_path: Path) -> None:
        model = mplus.wrap(load_decoder(), {"mechanism": "notes"})
        memory = model.new_memory(tokenizer=words())
        memory.write(KEY, source="key")
        memory.save(tmp_path / "old")
        with pytest.raises(InputError, match=r"which fits every decoder: use Memory\.load"):
            mplus.rewrite_memory(tmp_path / "old", model, tokenizer=words())


class TestCrash:
    def test_a_further_call_goes_on(
        self, old: tuple[Path, Hands], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, clock = old
        call: Any = functools.partial(
            mplus.rewrite_memory, path, next_model(), tokenizer=words(), old_tokenizer=words(), clock=clock
        )
        expected, written, real = facts(call()), list[int](), rewriting.write_streams

        def cut_off(after: int) -> None:
            def write(writes: Any, *rest: Any) -> None:
                if len(written) >= after:
                    raise KeyboardInterrupt
                written.append(1)
                real(writes, *rest)

            monkeypatch.setattr(rewriting, "write_streams", write)

        for after in (1, 3):
            cut_off(after)
            with pytest.raises(KeyboardInterrupt):
                call(tmp_path / "new")
            assert not (tmp_path / "new").exists()
            assert verify(tmp_path / "new.rewriting") == []
        cut_off(99)
        new = call(tmp_path / "new")
        assert facts(new) == expected
        assert len(written) == 4, "no text was written twice"
        new.close()

    def test_what_was_forgotten_meanwhile_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Hands()
        memory = tell(old_model().new_memory(tokenizer=words(), clock=clock), clock)
        memory.save(tmp_path / "old")
        call: Any = functools.partial(
            mplus.rewrite_memory, tmp_path / "old", next_model(), tmp_path / "new",
            tokenizer=words(), old_tokenizer=words(), clock=clock,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(rewriting, "_finish", lambda *rest, **named: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call()
        memory.forget("story")
        memory.save(tmp_path / "old")
        new = call()
        assert "story" not in [info.name for info in new.sources()]
        assert len(new.sources()) == 3

    def test_one_at_a_time(self, tmp_path: Path) -> None:
        tiny_mplus(tmp_path / "old")
        call: Any = functools.partial(
            mplus.rewrite_memory, tmp_path / "old", next_model(), tmp_path / "new",
            tokenizer=words(), old_tokenizer=words(),
        )  # fmt: skip
        with (
            Memory.open(tmp_path / "new.rewriting", next_model(), tokenizer=words(), keep_text=True),
            pytest.raises(LiveMemoryError),
        ):
            call()
        assert [info.name for info in call().sources()] == ["story"]


class TestRefused:
    def test_a_place_that_is_taken(self, tmp_path: Path) -> None:
        tiny_mplus(tmp_path / "old")
        before = files(tmp_path / "old")
        for to in (tmp_path / "old", tmp_path / "file"):
            (tmp_path / "file").write_text("mine")
            with pytest.raises(MemoryFileError, match="must be a folder that is not there yet, or empty"):
                mplus.rewrite_memory(tmp_path / "old", old_model(), to, tokenizer=words(), old_tokenizer=words())
        assert files(tmp_path / "old") == before

    def test_tokenizers(self, tmp_path: Path) -> None:
        tiny_mplus(tmp_path / "old")
        with pytest.raises(InputError, match="does not say of which tokenizer: pass old_tokenizer="):
            mplus.rewrite_memory(tmp_path / "old", foreign_model(), tokenizer=byte_tokenizer())
        with pytest.raises(InputError, match="needs the tokenizer of its decoder: pass tokenizer="):
            mplus.rewrite_memory(tmp_path / "old", foreign_model(), old_tokenizer=words())

    def test_what_has_expired_is_left_out(self, tmp_path: Path) -> None:
        clock = Hands()
        tell(old_model().new_memory(tokenizer=words(), clock=clock), clock).save(tmp_path / "old")
        late = Hands(NOON + timedelta(days=1))
        for tokens, model in ((words(), next_model()), (byte_tokenizer(), foreign_model())):
            new = mplus.rewrite_memory(tmp_path / "old", model, tokenizer=tokens, old_tokenizer=words(), clock=late)
            assert "soon" not in [info.name for info in new.sources()]
            assert len(new.sources()) == 3
