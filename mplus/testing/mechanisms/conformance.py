"""What every ``MemoryMechanism`` must do: ``MechanismConformance``."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from mplus.errors import InputError
from mplus.hf.model.model_class import MemoryModel
from mplus.testing.mechanisms.life import MechanismLife
from mplus.testing.mechanisms.suite import CHUNK, VOCABULARY, RowSuite
from mplus.testing.mechanisms.training import MechanismTraining


class MechanismMemory(MechanismLife, RowSuite):
    """The tests of ``MechanismConformance`` that need no training and no evaluation."""

    # ------------------------------------------------------------------ what it is

    def test_has_a_name_options_and_a_state(self) -> None:
        assert isinstance(self.implementation.name, str)
        assert self.implementation.name
        assert attrs.has(self.implementation.Options)
        assert attrs.has(self.implementation.State)

    def test_an_empty_memory_leaves_the_decoder_as_it_is_or_says_that_it_does_not(self, model: MemoryModel) -> None:
        ids = self.text(7)[None]
        same = torch.equal(self.logits(model, ids, model.new_memory()), self.logits(model, ids))
        assert same or not self.implementation.empty_is_base

    def test_what_is_written_changes_what_is_read(self, model: MemoryModel) -> None:
        ids, memory = self.text(7)[None], self.written(model, 1, 2)
        assert not torch.allclose(self.logits(model, ids, memory), self.logits(model, ids, model.new_memory()))

    def test_a_short_text_changes_what_is_read(self, model: MemoryModel) -> None:
        ids, memory = self.text(7)[None], self.written(model, 1)
        before = self.logits(model, ids, memory)
        memory.write(self.short_text(7), source="short")
        assert not torch.equal(self.logits(model, ids, memory), before)

    def test_prefix_rows_are_those_of_the_layer_that_sees_most(
        self, model: MemoryModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        most = model.mplus_engine.mechanism.prefix_rows(view)
        # One that chooses by the text, once, may find less than there is room for.
        assert max(seen) <= most if self.implementation.retrieves_in_open else max(seen) == most

    def test_rows_hold_as_much_text_as_capacity_says(self, model: MemoryModel) -> None:
        memory = self.written(model, 1, 2)
        state, store = memory.states[0], memory.stores[0]
        rows = [
            store.count(layer) + sum(counts[layer] for counts in state.counts().values())
            for layer in range(store.layout.layers)
        ]
        assert model.mplus_engine.mechanism.capacity(max(rows)) == 2 * CHUNK

    def test_no_list_of_the_store_grows_beyond_its_capacity(self) -> None:
        with self.wrapped(long_term_tokens=2 * CHUNK) as model:
            store = self.written(model, 1, 2, 3, 4, 5).stores[0]
            assert max(store.count(layer) for layer in range(store.layout.layers)) <= 2 * CHUNK

    # ------------------------------------------------------------------ forgetting what others took in

    def test_rebuilding_takes_back_what_later_chunks_took_in(self, model: MemoryModel) -> None:
        """Rebuilding leaves, bit for bit, what writing the other texts would have given."""
        memory, without = self.written(model, 1, 2, 3, keep_text=True), model.new_memory(seed=1, keep_text=True)
        memory.forget("s1", mode="rebuild")
        for number, seed in ((0, 1), (2, 3)):
            without.write(self.text(seed), source=f"s{number}")
        assert self.differences(memory, without) == []
        assert [source.name for source in memory.sources()] == ["s0", "s2"]

    def test_sources_are_isolated_or_it_says_that_they_are_not(self, model: MemoryModel) -> None:
        """Where they are, forgetting one leaves the same rows whatever its text was, those written later included."""
        first, second = self.written(model, 1, 2, 3), self.written(model, 1, 5, 3)
        for memory in (first, second):
            memory.forget("s1")
        same = self.differences(first, second) == []
        assert same or not model.mplus_engine.mechanism.isolated_sources

    # ------------------------------------------------------------------ what goes wrong

    def test_a_refused_text_changes_nothing(self, model: MemoryModel) -> None:
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        with pytest.raises(InputError):
            memory.write(torch.full((CHUNK,), VOCABULARY + 5), source="s2")
        assert self.differences(memory, other) == []


class MechanismConformance(MechanismMemory, MechanismTraining):
    """Subclass it in a test module and set ``implementation``.

    All tests run on a small trained decoder that comes with mplus, in float64 unless ``dtype`` says otherwise, so that
    what differs by more than rounding differs for a reason. How far two ways to compute the same may be apart in
    another dtype is measured.

    Example:
        >>> class TestTokenMemory(MechanismConformance):
        ...     implementation = TokenMemory

    Attributes:
        implementation: the mechanism class under test; it need not be registered.
        settings: of the memory, besides the mechanism; sizes such that a read retrieves all that the tests write.
        dtype: of weights and computation.
    """
