"""Figures exist, are the same every time, and show only what may be shown."""

from __future__ import annotations

import sys

import pytest

from mplus.errors import ConfigError, MissingDependencyError
from mplus.evaluation.reports.plots import caption, draw, drawn
from mplus.evaluation.reports.report import Report
from tests.evaluation.reports.examples import example


def test_png_and_svg_are_the_same_every_time(tmp_path):
    first = draw(example(), tmp_path / "a.png", tmp_path / "a.svg")
    second = draw(example(), tmp_path / "b.png", tmp_path / "b.svg")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in first[1].read_bytes()


def test_what_is_drawn_and_what_is_named_instead(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    draw(example(), tmp_path / "a.svg")
    axes = figures[0].axes[0]
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert set(curves) == {
        "none", "memoryllm", "mplus", "theory: any of K", "theory: one row", "chance", "borderline",
    }  # fmt: skip
    assert list(curves["memoryllm"].get_xdata()) == [0, 1, 2, 8, 16, 32, 64, 128]
    assert curves["theory: one row"].get_linestyle() == "--"
    assert curves["chance"].get_linestyle() == curves["borderline"].get_linestyle() == ":"
    assert [one.name for one in drawn(example())] == ["none", "memoryllm", "mplus"]
    words = " ".join(figures[0].texts[0].get_text().split())
    assert words == caption(example())
    assert "Not drawn: window: not converged (0.71 of" in words
    assert "snapkv: skipped (no file of answers was given)" in words


def test_a_report_without_cells_can_be_drawn(tmp_path):
    [path] = draw(Report(protocol="nothing", arms=[]), tmp_path / "empty.png")
    assert path.stat().st_size


def test_other_kinds_of_file(tmp_path):
    with pytest.raises(ConfigError, match=r"\.png or \.svg, got .*figure\.pdf"):
        draw(example(), tmp_path / "figure.pdf")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"drawing a report needs .*'matplotlib'.*mplus\[eval\]"):
        draw(example(), tmp_path / "a.png")
