"""HMT does what every mechanism must do."""

from __future__ import annotations

import pytest
import torch
from mplus_hmt.mechanism import HMTMechanism

from mplus.testing.mechanisms import MechanismConformance


class TestHMT(MechanismConformance):
    implementation = HMTMechanism


@pytest.mark.nightly
class TestHMTInHalfPrecision(MechanismConformance):
    implementation = HMTMechanism
    dtype = torch.bfloat16
