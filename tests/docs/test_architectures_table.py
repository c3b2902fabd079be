"""The table in the docs is what was measured, for every architecture and within the tolerances of the tests."""

from __future__ import annotations

import pytest

from benchmarks.pages import architectures as page
from benchmarks.quality.architectures.comparisons import HYBRID_TOLERANCE, SEARCHES, TOLERANCE
from benchmarks.quality.architectures.decoders import ARCHITECTURES, BY_NAME
from benchmarks.quality.architectures.measure import COLUMNS
from benchmarks.records import load


@pytest.fixture
def record() -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    return load("quality", "architectures")


def test_the_page_is_rendered_from_the_record(record: dict[str, dict[str, dict[str, dict[str, object]]]]) -> None:
    assert page.render(record) == page.PAGE.read_text(encoding="utf-8"), "run: python -m benchmarks.pages.architectures"


def test_the_record_is_complete_and_within_the_tolerances(
    record: dict[str, dict[str, dict[str, dict[str, object]]]],
) -> None:
    assert len(record) >= 2, "both the oldest supported and the newest transformers are measured"
    for run in record.values():
        assert run["rows"].keys() == {architecture.name for architecture in ARCHITECTURES}
        for name, row in run["rows"].items():
            architecture = BY_NAME[name]
            assert ("refused" in row) == (architecture.refused is not None)
            if architecture.refused is not None:
                continue
            allowed = HYBRID_TOLERANCE if architecture.hybrid else TOLERANCE
            assert all(row[column] is None or row[column] <= allowed for column in COLUMNS), name
            assert row["generate"] == (sorted(SEARCHES) if architecture.stable_cache else None)
