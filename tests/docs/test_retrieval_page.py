"""The page on retrieval says what the records say."""

from __future__ import annotations

import pytest

from benchmarks.pages import retrieval as retrieval_page


def test_the_page_is_made_from_the_records():
    page = retrieval_page.PAGE.read_text(encoding="utf-8")
    assert page == retrieval_page.render(retrieval_page.load()), "run: python -m benchmarks.pages.retrieval"


def test_so_is_the_figure():
    record = retrieval_page.load()["speed"]
    assert retrieval_page.FIGURE.read_text(encoding="utf-8") == retrieval_page.figure(record)


def test_an_index_keeps_what_exact_retrieval_answers():
    """At every age, within what as many questions can tell apart."""
    found = retrieval_page.load()["retention"]["by_score"]["mean_dot"]
    arms = {arm["name"]: arm["accuracy_by_age"] for arm in found["report"]["arms"]}
    for age, exact in arms["mplus"].items():
        for name in ("mplus-faiss_ivf", "mplus-faiss_ivf-few", "mplus-centroid"):
            assert arms[name][age] == pytest.approx(exact, abs=0.02), (name, age)


def test_keys_are_of_text_without_repeated_sentences():
    keys = retrieval_page.load()["speed"]["keys"]
    assert keys["distinct_sentences"] == keys["memories"] * keys["chunks"] == keys["rows"] // 4
