"""LaMemo does what every mechanism must do."""

from __future__ import annotations

import pytest
import torch
from mplus_lamemo.mechanism import LaMemoMechanism

from mplus.testing.mechanisms import MechanismConformance


class TestLaMemo(MechanismConformance):
    implementation = LaMemoMechanism


@pytest.mark.nightly
class TestLaMemoInHalfPrecision(MechanismConformance):
    implementation = LaMemoMechanism
    dtype = torch.bfloat16
