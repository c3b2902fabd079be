"""Whether kernels are interpreted is settled when triton is imported: so it is by a process of its own."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    """Skip unless kernels are interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "kernels are interpreted only in a process of their own: TRITON_INTERPRET=1 pytest tests/interpreted"
        )
