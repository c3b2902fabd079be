"""What every mechanism must do, whatever its memories are made of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, ParamSpec

import pytest
import torch

from mplus.errors import InputError
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.memory.format.offline import saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.memory.writing.messages import turns
from mplus.testing.mechanisms.suite import MechanismSuite, bytes_of, content_of, unequal

P = ParamSpec("P")


class MechanismLife(MechanismSuite):
    """The life of a memory: copied, read in several ways, saved, opened after a crash, made to forget."""

    # ------------------------------------------------------------------ streams are apart

    def test_a_copy_goes_on_by_itself(self, model: MemoryModel) -> None:
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        fork = memory.fork()
        assert self.differences(fork, memory) == []
        fork.write(self.text(3), source="s2")
        assert self.differences(memory, other) == []
        other.write(self.text(3), source="s2")
        assert self.differences(fork, other) == []

    def test_a_view_is_not_changed_by_later_writes(self, model: MemoryModel) -> None:
        memory = self.written(model, 1, 2)
        [view] = memory.streams.versioned_snapshot()[1]
        before = content_of(view.state, view.store)
        memory.write(self.text(3), source="s2")
        memory.forget("s0")
        assert unequal(before, content_of(view.state, view.store)) == []

    def test_streams_that_are_written_and_read_together_are_as_alone(self, model: MemoryModel) -> None:
        together = model.new_memory(2, seed=1, **self.given())
        for number, chunks in enumerate(((1, 4), (2, 5))):
            together.write([self.text(seed) for seed in chunks], source=f"s{number}")
        alone = [self.written(model, 1, 2), self.written(model, 4, 5)]
        ids = torch.stack([self.prompt(7), self.prompt(8)])
        found = self.logits(model, ids, together)
        for row, memory in enumerate(alone):
            expected = self.logits(model, ids[row : row + 1], memory)
            assert (found[row : row + 1] - expected).abs().max() <= self.tolerance(model)

    def test_padding_on_the_left_is_not_seen(self, model: MemoryModel) -> None:
        memory, ids = self.written(model, 1, 2).fork(0), self.prompt(7)[None]
        mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], 1)
        padded = torch.cat([torch.ones(1, 5, dtype=torch.int64), ids], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = self.logits(model, padded, memory, attention_mask=mask, position_ids=positions)[:, 5:]
        assert (found - self.logits(model, ids, memory)).abs().max() <= self.tolerance(model)

    def test_tokens_with_a_cache_are_as_in_one_forward(self, model: MemoryModel) -> None:
        """Sizes are such that every read retrieves all there is."""
        memory, ids = self.written(model, 1, 2), self.prompt(7)[None]
        whole = self.logits(model, ids, memory, **self.asking)
        with torch.no_grad():
            out = model(ids[:, :8], memory=memory, use_cache=True, **self.asking)
            found = [out.logits]
            for place in range(8, ids.shape[1]):
                out = model(ids[:, place : place + 1], memory=memory, past_key_values=out.past_key_values)
                found.append(out.logits)
        assert (torch.cat(found, 1) - whole).abs().max() <= self.tolerance(model)

    # ------------------------------------------------------------------ files

    def test_a_saved_memory_goes_on_as_the_one_that_was_saved(self, model: MemoryModel, tmp_path: Path) -> None:
        memory = self.written(model, 1, 2)
        memory.save(tmp_path / "saved")
        loaded = self.loaded(tmp_path / "saved", model)
        assert self.differences(loaded, memory) == []
        for one in (loaded, memory):
            one.write(self.text(3), source="s2")
        assert self.differences(loaded, memory) == []

    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_a_directory_survives_a_crash(self, model: MemoryModel, tmp_path: Path, checkpoint: bool) -> None:
        with self.opened(tmp_path / "live", model, seed=1) as memory:
            for number, seed in enumerate((1, 2, 3)):
                memory.write(self.text(seed), source=f"s{number}")
                if checkpoint and number == 1:
                    memory.checkpoint()
            shutil.copytree(tmp_path / "live", tmp_path / "killed")  # what a process that is killed now leaves
        expected = self.written(model, 1, 2, 3)
        for folder in ("live", "killed"):
            with self.opened(tmp_path / folder, model, read_only=True) as memory:
                assert self.differences(memory, expected) == []

    def test_a_record_that_a_crash_tore_was_never_written(self, model: MemoryModel, tmp_path: Path) -> None:
        with self.opened(tmp_path / "live", model, seed=1) as memory:
            for number, seed in enumerate((1, 2, 3)):
                memory.write(self.text(seed), source=f"s{number}")
            shutil.copytree(tmp_path / "live", tmp_path / "killed")
        [journal] = (tmp_path / "killed").glob("journal-*")
        os.truncate(journal, journal.stat().st_size - 1)
        with self.opened(tmp_path / "killed", model) as memory:
            assert self.differences(memory, self.written(model, 1, 2)) == []
            memory.write(self.text(3), source="s2")
            assert self.differences(memory, self.written(model, 1, 2, 3)) == []

    def test_files_are_listed_verified_and_repaired_without_a_decoder(self, model: MemoryModel, tmp_path: Path) -> None:
        memory = self.written(model, 1, 2)
        memory.save(tmp_path / "saved")
        assert verify(tmp_path / "saved") == []
        assert saved_sources(tmp_path / "saved")[0] == memory.sources()
        assert repair(tmp_path / "saved", tmp_path / "repaired") == []
        assert self.differences(self.loaded(tmp_path / "repaired", model), memory) == []

    def test_texts_are_written_once_wholly_or_in_the_place_of_others(self, model: MemoryModel, tmp_path: Path) -> None:
        with self.opened(tmp_path / "live", model, seed=1) as memory:
            report = memory.write(self.text(1), source="s0", write_id="first")
            memory.write(self.text(2), source="s1", atomic=True)
            assert memory.write(self.text(1), source="s0", write_id="first") == report
            expected = self.written(model, 1, 2)
            assert self.differences(memory, expected) == []
            memory.replace("s1", self.text(3))
            expected.forget("s1")
            expected.write(self.text(3), source="s1")
            assert self.differences(memory, expected) == []
        with self.opened(tmp_path / "live", model, read_only=True) as memory:
            assert self.differences(memory, expected) == []

    # ------------------------------------------------------------------ forgetting

    def test_a_forgotten_source_leaves_no_trace(self, model: MemoryModel) -> None:
        """Two memories that differ in their last source only are the same ones once it is forgotten."""
        first, second = self.written(model, 1, 2, 3), self.written(model, 1, 2, 4)
        assert self.differences(first, second)
        for memory in (first, second):
            memory.forget("s2")
        assert self.differences(first, second) == []
        assert [source.name for source in first.sources()] == ["s0", "s1"]

    def test_a_forgotten_source_is_in_no_file(self, model: MemoryModel, tmp_path: Path) -> None:
        secret = self.text(9)
        with self.opened(tmp_path / "live", model, seed=1, **self.keeping) as memory:
            memory.write(self.text(1), source="s0")
            memory.write(secret, source="a name to be forgotten")
            assert b"a name to be forgotten" in bytes_of(tmp_path / "live")
            memory.forget("a name to be forgotten")
            memory.save(tmp_path / "saved")
        for folder in ("live", "saved"):
            found = bytes_of(tmp_path / folder)
            traces = {"its name": b"a name to be forgotten", **self.traces(secret)}
            assert [what for what, trace in traces.items() if trace in found] == []

    def test_rows_of_other_sources_stay(self, model: MemoryModel) -> None:
        memory = self.written(model, 1, 2)
        before = {source.name: source.held for source in memory.sources()}
        memory.forget("s1")
        assert {source.name: source.held for source in memory.sources()} == {"s0": before["s0"]}

    # ------------------------------------------------------------------ short texts, and chats

    def test_a_short_text_is_kept_and_forgotten(self, model: MemoryModel, tmp_path: Path) -> None:
        memory, ids = self.written(model, 1), self.prompt(7)[None]
        report = memory.write(self.short_text(7), source="short")
        assert report.tokens[0] == memory.sources()[1].tokens > 0
        assert report.chunks[0] or report.tail_tokens == report.tokens, "it is written, or waits"
        memory.save(tmp_path)
        again = self.loaded(tmp_path, model)
        assert self.differences(again, memory) == []
        assert torch.equal(self.logits(model, ids, again), self.logits(model, ids, memory))
        again.flush()
        assert again.sources()[1].chunks > 0 == again.sources()[1].tail_tokens
        for one in (memory, again):
            one.forget("short")
            assert [source.name for source in one.sources()] == ["s0"]
            assert one.states[0].tail == ()

    def test_messages_are_written_turn_by_turn(self, model: MemoryModel) -> None:
        given = {**self.given(), "tokenizer": load_tokenizer()}
        told = [{"role": "user", "content": "I like tea. " * 9}, {"role": "assistant", "content": "With milk?"}]
        memory, other = model.new_memory(seed=1, **given), model.new_memory(seed=1, **given)
        memory.write(told, source="chat")
        for turn in turns(told):
            other.write(turn, source="chat")
        assert self.differences(memory, other) == []
        version = memory.version
        for wrong in ([{"role": "user", "content": " "}], [*told, {"role": "user"}]):
            with pytest.raises(InputError):
                memory.write(wrong)
        assert memory.version == version

    # ------------------------------------------------------------------ what goes wrong

    @pytest.mark.parametrize("method", ["write", "absorb"])
    def test_a_write_that_fails_changes_nothing(
        self, model: MemoryModel, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        """The second chunk of the text fails, after the mechanism has done all its work on it."""
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        monkeypatch.setattr(self.implementation, method, _failing(getattr(self.implementation, method)))
        with pytest.raises(RuntimeError, match="as planned"):
            memory.write(self.text(3), source="s2")
        monkeypatch.undo()
        assert self.differences(memory, other) == []
        for one in (memory, other):
            one.write(self.text(3), source="s2")
        assert self.differences(memory, other) == []


def _failing(method: Callable[P, object]) -> Callable[P, NoReturn]:
    """Return ``method`` so that it fails once it is done."""

    def failing(*given: P.args, **named: P.kwargs) -> NoReturn:
        method(*given, **named)
        raise RuntimeError("as planned")

    return failing
