"""MEMO's arithmetic, computed from its paper by an independent reference, is ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from mplus.interop import replay
from mplus.training.activations import planning

CASES = Path(__file__).parent / "memo.json"


def test_cases_are_replayed_but_for_the_planning_of_addresses():
    (report,) = replay(CASES)
    assert report.passed()
    assert report.steps == 17
    assert {name.split()[0] for name in report.skipped} == {"memo-24", "memo-26", "memo-28"}
    assert all("addresses are not planned here" in reason for reason in report.skipped.values())
    assert report.worst < 1e-9


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("KEPT_LAYERS", 1),
        ("swapped_tokens", lambda share, tokens: round(share * tokens)),
        ("swapped_tokens", lambda share, tokens: int(share * (tokens - 1))),
    ],
)
def test_the_cases_see_mistakes(monkeypatch, name, mistake):
    from mplus.training.activations import player

    for module in (planning, player):
        monkeypatch.setattr(module, name, mistake)
    (report,) = replay(CASES)
    assert not report.passed()
