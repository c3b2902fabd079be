"""The memory of MemLong's paper does what every mechanism must do."""

from __future__ import annotations

from typing import ClassVar

import pytest
from mplus_memlong import MemLongMechanism

from mplus.config import JsonValue
from mplus.testing.mechanisms import MechanismConformance


class TestPaper(MechanismConformance):
    implementation = MemLongMechanism


@pytest.mark.nightly
class TestGated(MechanismConformance):
    """With what the other one leaves out: the gate, rows at positions of their own, several groups a chunk."""

    implementation = MemLongMechanism
    mechanism: ClassVar[dict[str, JsonValue]] = {
        "name": "memlong", "gate": True, "positions": "continual", "group_tokens": 5, "query": "text"
    }  # fmt: skip

    @classmethod
    def memory_table(cls) -> dict[str, JsonValue]:
        return {**super().memory_table(), "mechanism": cls.mechanism}
