"""Figures of reports: accuracy over age, one curve per arm. Equal reports give equal bytes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mplus.errors import ConfigError
from mplus.evaluation import require_extra
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.tables import without_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
WIDTH, HEIGHT, LINE = 7.8, 4.6, 0.17
"""Inches; ``LINE`` for each line of the caption."""

STYLES = {
    "none": ("#999999", "x"),
    "window": ("#56b4e9", "s"),
    "memoryllm": ("#e69f00", "^"),
    "mplus": ("#0072b2", "o"),
    "mplus-random": ("#d55e00", "v"),
    "mplus-recency": ("#cc79a7", "<"),
    "mplus-attention": ("#009e73", ">"),
    "mplus-oracle": ("#000000", "D"),
    "bm25": ("#8c6d31", "P"),
    "full-context": ("#6a51a3", "h"),
    "snapkv": ("#7f2704", "X"),
}
"""Colour and marker of an arm, the same in every figure (colours of Okabe and Ito, and a few more)."""

OTHER = ("#444444", ".")


def draw(report: Report, *paths: str | Path) -> list[Path]:
    """Write the figure to every path, as PNG or SVG by its suffix.

    Drawn are arms with status "ok", with 95 % intervals; theory is dashed, chance and borderline are dotted. Arms that
    were skipped or did not converge are named in the caption.

    Raises:
        ConfigError: a path with another suffix.
        MissingDependencyError: matplotlib is not installed.
    """
    targets = [Path(path) for path in paths]
    check_paths(targets)
    matplotlib = require_extra("matplotlib", "drawing a report")
    # A salt instead of random ids, and no date: the same report gives the same file.
    # Simplified paths differ between versions of matplotlib.
    with matplotlib.rc_context({"svg.hashsalt": "mplus", "font.size": 9, "path.simplify": False}):
        figure = _figure(report)
        for path in targets:
            svg = path.suffix.lower() == ".svg"
            metadata = {"Date": None, "Creator": None} if svg else {"Software": None}
            figure.savefig(path, format="svg" if svg else "png", dpi=160, metadata=metadata)
    return targets


def check_paths(paths: Iterable[Path]) -> None:
    """Raise ConfigError unless a figure can be written to each of ``paths``."""
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"a figure must be written to a path ending in {' or '.join(SUFFIXES)}, got {path}")


def caption(report: Report) -> str:
    """Return the lines of text under the figure."""
    parts = [f"Accuracy over age ({report.protocol}); bands are 95 % intervals."]
    if report.theory:
        laws = "; ".join(f"{curve.name} {curve.formula}" for curve in report.theory)
        parts.append(f"Dashed, for a full short-term memory: {laws}.")
    if report.chance is not None:
        parts.append(f"Chance: {report.chance:.3f}.")
    if report.borderline is not None:
        parts.append(f"Borderline (told nothing): {report.borderline:.3f}.")
    missing = [without_numbers(arm) for arm in report.arms if arm.status != "ok"]
    if missing:
        parts.append(f"Not drawn: {'; '.join(missing)}.")
    return " ".join(parts)


def drawn(report: Report) -> list[Arm]:
    """Return the arms that get a curve."""
    return [arm for arm in report.arms if arm.status == "ok" and arm.cells]


def _figure(report: Report) -> Figure:
    lines = textwrap.wrap(caption(report), 128)
    height = HEIGHT + LINE * len(lines)
    figure: Figure = require_extra("matplotlib.figure", "drawing a report").Figure(figsize=(WIDTH, height))
    require_extra("matplotlib.backends.backend_agg", "drawing a report").FigureCanvasAgg(figure)
    bottom = (LINE * len(lines) + 0.65) / height
    axes = figure.add_axes((0.08, bottom, 0.68, 1 - bottom - 0.6 / height))
    looks = styles([arm.name for arm in drawn(report)])
    for arm in drawn(report):
        ages, shares = [cell.age for cell in arm.cells], [cell.accuracy for cell in arm.cells]
        low, high = zip(*(cell.interval for cell in arm.cells), strict=True)
        colour, marker = looks[arm.name]
        axes.fill_between(ages, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
        axes.plot(ages, shares, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=arm.name, zorder=3)
    for curve, shade in zip(report.theory, ("#222222", "#888888", "#bbbbbb"), strict=False):
        ages = sorted(curve.accuracy_by_age)
        shares = [curve.accuracy_by_age[age] for age in ages]
        axes.plot(ages, shares, linestyle="--", color=shade, linewidth=1, label=f"theory: {curve.name}", zorder=4)
    for name, value, colour in (("chance", report.chance, "#000000"), ("borderline", report.borderline, "#b22222")):
        if value is not None:
            axes.axhline(value, linestyle=":", color=colour, linewidth=1, label=name, zorder=1)
    _axes(axes, report)
    figure.text(0.01, 0.06 / height, "\n".join(lines), fontsize=7.5, va="bottom", linespacing=1.25)
    return figure


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Choose colour and marker of each: its own, or one that no other has; ``OTHER`` where those have run out."""
    free = iter([style for name, style in STYLES.items() if name not in names])
    return {name: STYLES.get(name) or next(free, OTHER) for name in names}


def _axes(axes: Axes, report: Report) -> None:
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0)
    ages = _apart(report.ages)
    _ages(axes, report, ages, [f"{age:,}" for age in ages], "age in chunks")
    if report.age_tokens:
        tokens = [f"{report.age_tokens[age]:,.0f}" if age in report.age_tokens else "" for age in ages]
        _ages(axes.twiny(), report, ages, tokens, "age in tokens")


def _ages(axes: Axes, report: Report, ages: Sequence[int], labels: Sequence[str], title: str) -> None:
    """Lay out an axis of ages, which grow by factors from 0 on."""
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.6)
    last = max(report.ages, default=1)
    axes.set_xlim(-0.2, last * 1.15 if last else 1)
    axes.set_xticks(ages, labels)
    axes.minorticks_off()
    axes.set_xlabel(title)


def _apart(ages: Sequence[int]) -> list[int]:
    """Return the ages whose labels have room beside each other; the greatest is always one of them."""
    kept: list[int] = []
    step = math.log2(1 + max(ages, default=0)) / 14
    for age in reversed(ages):
        if not kept or math.log2(1 + kept[-1]) - math.log2(1 + age) >= step:
            kept.append(age)
    return kept[::-1]
