"""What every ``MemoryMechanism`` must do."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from mplus.errors import InputError
from mplus.testing.mechanisms.life import MechanismLife
from mplus.testing.mechanisms.suite import CHUNK, VOCABULARY
from mplus.testing.mechanisms.training import MechanismTraining


class MechanismConformance(MechanismLife, MechanismTraining):
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

    # ------------------------------------------------------------------ what goes wrong

    def test_a_refused_text_changes_nothing(self, model: Any) -> None:
        memory, other = self.written(model, 1, 2), self.written(model, 1, 2)
        with pytest.raises(InputError):
            memory.write(torch.full((CHUNK,), VOCABULARY + 5), source="s2")
        assert self.differences(memory, other) == []
