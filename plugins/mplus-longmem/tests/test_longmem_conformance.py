"""LongMem does what every mechanism must do; the published variant breaks what its defects break."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from mplus_longmem import LongMemMechanism

from mplus.config import JsonValue
from mplus.errors import ConfigError
from mplus.hf.model.model_class import MemoryModel
from mplus.testing.mechanisms import MechanismConformance
from mplus.training import train


class TestLongMem(MechanismConformance):
    implementation = LongMemMechanism
    settings: ClassVar[Mapping[str, JsonValue]] = {"retrieved_tokens": 200}


@pytest.mark.parametrize("name", ["longmem-tiny", "longmem-recall"])
def test_the_recipes_run(name: str) -> None:
    done = train(name, dry_run=True, progress=False)
    assert all(math.isfinite(float(record["total_loss"])) for record in done.records)
    trained = {name for name, one in done.model.named_parameters() if one.requires_grad}
    assert trained
    assert all(name.startswith("mplus.") for name in trained)


@pytest.mark.nightly
class TestPublished(MechanismConformance):
    implementation = LongMemMechanism
    settings: ClassVar[Mapping[str, JsonValue]] = {"retrieved_tokens": 200, "variant": "published"}

    def test_streams_that_are_written_and_read_together_are_as_alone(self, model: MemoryModel) -> None:
        """One bank for all rows of a batch (L10)."""
        with pytest.raises(AssertionError):
            super().test_streams_that_are_written_and_read_together_are_as_alone(model)

    def test_a_short_text_changes_what_is_read(self, model: MemoryModel) -> None:
        """It fills no chunk, and is dropped."""
        with pytest.raises(AssertionError):
            super().test_a_short_text_changes_what_is_read(model)

    def test_a_short_text_is_kept_and_forgotten(self, model: MemoryModel, tmp_path: Path) -> None:
        """It fills no chunk, and is dropped."""
        with pytest.raises(AssertionError):
            super().test_a_short_text_is_kept_and_forgotten(model, tmp_path)

    def test_it_trains(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Training is for the variant "paper"."""
        with pytest.raises(ConfigError, match="variant must be 'paper' for training"):
            super().test_it_trains(monkeypatch, tmp_path)

    def test_a_training_of_nothing_is_refused_by_name(self, model: MemoryModel, tmp_path: Path) -> None:
        """As above."""
        with pytest.raises(ConfigError, match="variant must be 'paper' for training"):
            super().test_a_training_of_nothing_is_refused_by_name(model, tmp_path)
