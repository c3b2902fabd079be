"""Every test starts from the same random state: new adapters and retrievers draw from it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)
