"""Kernels that are interpreted cannot be compiled in the same process."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def compiler():
    """Skip where kernels are interpreted."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are compiled only without TRITON_INTERPRET=1")
