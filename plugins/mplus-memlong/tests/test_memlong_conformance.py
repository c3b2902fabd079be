"""The memory of MemLong's paper does what every mechanism must do."""

from __future__ import annotations

from mplus_memlong import MemLongMechanism

from mplus.testing.mechanisms import MechanismConformance


class TestPaper(MechanismConformance):
    implementation = MemLongMechanism
