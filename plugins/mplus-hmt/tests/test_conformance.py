"""HMT does what every mechanism must do."""

from __future__ import annotations

from mplus_hmt.mechanism import HMTMechanism

from mplus.testing.mechanisms import MechanismConformance


class TestHMT(MechanismConformance):
    implementation = HMTMechanism
