"""Traces of the published code are done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from mplus.interop import replay

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("case", ["longmem_a", "longmem_b"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_trace_of_the_published_code_is_done_again(case: str, reset: bool) -> None:
    (report,) = replay(GOLDENS / case, reset=reset)
    assert report.passed(), (report.errors, report.equal, report.differences)
