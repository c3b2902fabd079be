"""LongMem does what every mechanism must do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mplus_longmem import LongMemMechanism

from mplus.config import JsonValue
from mplus.testing.mechanisms import MechanismConformance


class TestLongMem(MechanismConformance):
    implementation = LongMemMechanism
    settings: ClassVar[Mapping[str, JsonValue]] = {"retrieved_tokens": 200}
