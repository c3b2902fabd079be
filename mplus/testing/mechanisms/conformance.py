"""What every ``MemoryMechanism`` must do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import mplus
from mplus.errors import InputError
from mplus.memory.format.offline import saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.testing.mechanisms.suite import CHUNK, VOCABULARY, bytes_of, content_of, unequal
from mplus.testing.mechanisms.training import MechanismTraining


class MechanismConformance(MechanismTraining):
    """Subclass it in a test module and set ``implementation``.

    All tests run on a small trained decoder that comes with mplus, in float64 unless ``dtype`` says otherwise, so that
    what differs by more than rounding differs for a reason.

    Example:
        >>> class TestTokenMemory(MechanismConformance):
        ...     implementation = TokenMemory

    Attributes:
        implementation: the mechanism class under test; it need not be registered.
        settings: of the memory, besides the mechanism; sizes such that a read retrieves all that the tests write.
        dtype: of weights and computation.
    """

    # ------------------------------------------------------------------ what it is

    def test_has_a_name_options_and_a_state(self) -> None:
        assert isinstance(self.implementation.name, str)
        assert self.implementation.name
        assert attrs.has(self.implementation.Options)
        assert attrs.has(self.implementation.State)

    def test_an_empty_memory_leaves_the_decoder_as_it_is_or_says_that_it_does_not(self, model: Any) -> None:
        ids = self.text(7)[None]
        same = torch.equal(self.logits(model, ids, model.new_memory()), self.logits(model, ids))
        assert same or not self.implementation.empty_is_base

    def test_what_is_written_changes_what_is_read(self, model: Any) -> None:
        ids, memory = self.text(7)[None], self.written(model, 1, 2)
        assert not torch.allclose(self.logits(model, ids, memory), self.logits(model, ids, model.new_memory()))

    def test_prefix_rows_are_those_of_the_layer_that_sees_most(self, model: Any, monkeypatch: Any) -> None:
        own, seen = self.implementation.prefix, [0]

        def counted(mechanism: Any, *given: Any) -> Any:
            found = own(mechanism, *given)
            segments: Any = getattr(found, "segments", found) or ()
            seen.append(sum(segment.keys.shape[2] for segment in segments))
            return found

        memory = self.written(model, 1, 2, 3)
        [view] = memory.streams.versioned_snapshot()[1]
        monkeypatch.setattr(self.implementation, "prefix", counted)
        self.logits(model, self.text(7)[None], memory)
        assert max(seen) == model.mplus_engine.mechanism.prefix_rows(view)

    # ------------------------------------------------------------------ streams are apart

    def test_a_copy_goes_on_by_itself(self, model: Any) -> None:
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        fork = memory.fork()
        assert self.differences(fork, memory) == []
        fork.write(self.text(3), source="s2")
        assert self.differences(memory, other) == []
        other.write(self.text(3), source="s2")
        assert self.differences(fork, other) == []

    def test_a_view_is_not_changed_by_later_writes(self, model: Any) -> None:
        memory = self.written(model, 1, 2)
        [view] = memory.streams.versioned_snapshot()[1]
        before = content_of(view.state, view.store)
        memory.write(self.text(3), source="s2")
        memory.forget("s0")
        assert unequal(before, content_of(view.state, view.store)) == []

    def test_streams_that_are_written_and_read_together_are_as_alone(self, model: Any) -> None:
        together = model.new_memory(2, seed=1)
        for chunks in ((1, 4), (2, 5)):
            together.write([self.text(seed) for seed in chunks])
        alone = [self.written(model, 1, 2), self.written(model, 4, 5)]
        ids = torch.stack([self.text(7), self.text(8)])
        found = self.logits(model, ids, together)
        for row, memory in enumerate(alone):
            expected = self.logits(model, ids[row : row + 1], memory)
            assert (found[row : row + 1] - expected).abs().max() <= self.tolerance(model)

    def test_padding_on_the_left_is_not_seen(self, model: Any) -> None:
        memory, ids = self.written(model, 1, 2).fork(0), self.text(7)[None]
        mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], 1)
        padded = torch.cat([torch.ones(1, 5, dtype=torch.int64), ids], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = self.logits(model, padded, memory, attention_mask=mask, position_ids=positions)[:, 5:]
        assert (found - self.logits(model, ids, memory)).abs().max() <= self.tolerance(model)

    def test_tokens_with_a_cache_are_as_in_one_forward(self, model: Any) -> None:
        """Sizes are such that every read retrieves all there is."""
        memory, ids = self.written(model, 1, 2), self.text(7)[None]
        whole = self.logits(model, ids, memory)
        with torch.no_grad():
            out = model(ids[:, :8], memory=memory, use_cache=True)
            found = [out.logits]
            for place in range(8, ids.shape[1]):
                out = model(ids[:, place : place + 1], memory=memory, past_key_values=out.past_key_values)
                found.append(out.logits)
        assert (torch.cat(found, 1) - whole).abs().max() <= self.tolerance(model)

    # ------------------------------------------------------------------ files

    def test_a_saved_memory_goes_on_as_the_one_that_was_saved(self, model: Any, tmp_path: Path) -> None:
        memory = self.written(model, 1, 2)
        memory.save(tmp_path / "saved")
        loaded = mplus.Memory.load(tmp_path / "saved", model)
        assert self.differences(loaded, memory) == []
        for one in (loaded, memory):
            one.write(self.text(3), source="s2")
        assert self.differences(loaded, memory) == []

    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_a_directory_survives_a_crash(self, model: Any, tmp_path: Path, checkpoint: bool) -> None:
        with mplus.Memory.open(tmp_path / "live", model, seed=1) as memory:
            for number, seed in enumerate((1, 2, 3)):
                memory.write(self.text(seed), source=f"s{number}")
                if checkpoint and number == 1:
                    memory.checkpoint()
            shutil.copytree(tmp_path / "live", tmp_path / "killed")  # what a process that is killed now leaves
        expected = self.written(model, 1, 2, 3)
        for folder in ("live", "killed"):
            with mplus.Memory.open(tmp_path / folder, model, read_only=True) as memory:
                assert self.differences(memory, expected) == []

    def test_files_are_listed_verified_and_repaired_without_a_decoder(self, model: Any, tmp_path: Path) -> None:
        memory = self.written(model, 1, 2)
        memory.save(tmp_path / "saved")
        assert verify(tmp_path / "saved") == []
        assert saved_sources(tmp_path / "saved")[0] == memory.sources()
        assert repair(tmp_path / "saved", tmp_path / "repaired") == []
        assert self.differences(mplus.Memory.load(tmp_path / "repaired", model), memory) == []

    # ------------------------------------------------------------------ forgetting

    def test_a_forgotten_source_leaves_no_trace(self, model: Any) -> None:
        """Two memories that differ in their last source only are the same ones once it is forgotten."""
        first, second = self.written(model, 1, 2, 3), self.written(model, 1, 2, 4)
        assert self.differences(first, second)
        for memory in (first, second):
            memory.forget("s2")
        assert self.differences(first, second) == []
        assert [source.name for source in first.sources()] == ["s0", "s1"]

    def test_a_forgotten_source_is_in_no_file(self, model: Any, tmp_path: Path) -> None:
        secret = self.text(9)
        with mplus.Memory.open(tmp_path / "live", model, seed=1, keep_text=True) as memory:
            memory.write(self.text(1), source="s0")
            memory.write(secret, source="a name to be forgotten")
            assert b"a name to be forgotten" in bytes_of(tmp_path / "live")
            memory.forget("a name to be forgotten")
            memory.save(tmp_path / "saved")
        for folder in ("live", "saved"):
            found = bytes_of(tmp_path / folder)
            traces = {"its name": b"a name to be forgotten"}
            for dtype in (torch.int16, torch.int32, torch.int64):
                traces[f"its ids as {dtype}"] = secret.to(dtype).numpy().tobytes()
            assert [what for what, trace in traces.items() if trace in found] == []

    def test_rows_of_other_sources_stay(self, model: Any) -> None:
        memory = self.written(model, 1, 2)
        before = {source.name: source.held for source in memory.sources()}
        memory.forget("s1")
        assert {source.name: source.held for source in memory.sources()} == {"s0": before["s0"]}

    # ------------------------------------------------------------------ what goes wrong

    def test_a_refused_text_changes_nothing(self, model: Any) -> None:
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        with pytest.raises(InputError):
            memory.write(torch.full((CHUNK,), VOCABULARY + 5), source="s2")
        assert self.differences(memory, other) == []

    @pytest.mark.parametrize("method", ["write", "absorb"])
    def test_a_write_that_fails_changes_nothing(self, model: Any, monkeypatch: Any, method: str) -> None:
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


def _failing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``method`` so that it fails once it is done."""

    def failing(*given: Any, **named: Any) -> Any:
        method(*given, **named)
        raise RuntimeError("as planned")

    return failing
