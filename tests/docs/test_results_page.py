"""The page of results and the README say what the records say."""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages import results as results_page

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_records():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == results_page.render(), "run: python -m benchmarks.pages.results"


def test_the_readme_quotes_the_record():
    record = results_page.load("quality", "recall-tiny")
    assert record is not None
    quote = results_page.quote(record)
    assert quote in (ROOT / "README.md").read_text(encoding="utf-8"), "run: python -m benchmarks.pages.results"


def test_the_shipped_decoder_is_that_of_the_first_seed():
    record = results_page.load("quality", "recall-tiny")
    first = next(iter(record["seeds"]))
    card = (ROOT / "mplus" / "data" / "recall-tiny" / "README.md").read_text(encoding="utf-8")
    assert f"(seed {first})" in card
    assert list(map(int, record["seeds"])) == record["seeds_asked_for"], "no seed is left out"
