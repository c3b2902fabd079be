"""The page on long-term memory says what the records say."""

from __future__ import annotations

from benchmarks.pages import long_term as long_term_page


def test_the_page_is_made_from_the_records():
    page = long_term_page.PAGE.read_text(encoding="utf-8")
    assert page == long_term_page.render(long_term_page.load()), "run: python -m benchmarks.pages.long_term"


def test_so_is_the_figure():
    record = long_term_page.load()["million"]
    assert long_term_page.FIGURE.read_text(encoding="utf-8") == long_term_page.figure(record)
