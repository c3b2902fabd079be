"""LaMemo does what every mechanism must do."""

from __future__ import annotations

from mplus_lamemo.mechanism import LaMemoMechanism

from mplus.testing.mechanisms import MechanismConformance


class TestLaMemo(MechanismConformance):
    implementation = LaMemoMechanism
