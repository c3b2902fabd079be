"""Figures of what memories are worth: a bar for each arm, and heat maps of needles over length and depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mplus.evaluation import require_extra
from mplus.evaluation.reports.cell import wilson
from mplus.evaluation.reports.plots import check_paths
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.worth import CategoryFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDLE = re.compile(r"(\d+) tokens at depth ([\d.]+)")
"""Categories of needles, see ``mplus.evaluation.tasks.needles.CELL``."""


def heat_map(arm: Arm) -> dict[int, dict[float, float]]:
    """Return length in tokens -> depth -> share of needles found; {} where an arm was asked for none."""
    found: dict[int, dict[float, float]] = {}
    for name, facts in cast("dict[str, CategoryFacts]", arm.details.get("by_category", {})).items():
        if cell := NEEDLE.fullmatch(name):
            found.setdefault(int(cell[1]), {})[float(cell[2])] = facts["correct"] / facts["questions"]
    return {tokens: dict(sorted(row.items())) for tokens, row in sorted(found.items())}


def draw_worth(report: Report, *paths: str | Path) -> None:
    """Write a figure to every path, as PNG or SVG by its suffix: of needles a heat map for each arm, else bars.

    Raises:
        ConfigError: a path with another suffix.
        MissingDependencyError: matplotlib is not installed.
    """
    targets = [Path(path) for path in paths]
    check_paths(targets)
    matplotlib = require_extra("matplotlib", "drawing a report")
    arms = [arm for arm in report.arms if arm.status == "ok"]
    mapped = [arm for arm in arms if heat_map(arm)]
    # A salt instead of random ids, and no date: the same report gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "mplus", "font.size": 9}):
        figure = _heat_maps(mapped) if mapped else _bars(arms)
        figure.suptitle(f"{report.protocol}: share of questions answered right", fontsize=10)
        for path in targets:
            svg = path.suffix.lower() == ".svg"
            metadata = {"Date": None, "Creator": None} if svg else {"Software": None}
            figure.savefig(path, format="svg" if svg else "png", dpi=160, metadata=metadata)


def _figure(width: float, height: float) -> Figure:
    figure: Figure = require_extra("matplotlib.figure", "drawing a report").Figure(
        figsize=(width, height), layout="constrained"
    )
    require_extra("matplotlib.backends.backend_agg", "drawing a report").FigureCanvasAgg(figure)
    return figure


def _bars(arms: Sequence[Arm]) -> Figure:
    figure = _figure(7, 0.8 + 0.32 * len(arms))
    axes, names = figure.subplots(), [arm.name for arm in arms]
    counts = [(sum(c.correct for c in arm.cells), sum(c.questions for c in arm.cells)) for arm in arms]
    shares = [right / asked for right, asked in counts]
    bounds = [wilson(*count) for count in counts]
    errors = [
        [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
        [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
    ]
    axes.barh(names, shares, xerr=errors, color="#0072b2", ecolor="#444444", height=0.6)
    axes.invert_yaxis()  # the first arm on top, as in the table
    axes.set_xlim(0, 1)
    axes.set_xlabel("bars: share, lines: 95 % interval")
    return figure


def _heat_maps(arms: Sequence[Arm]) -> Figure:
    figure = _figure(1 + 2.6 * len(arms), 3)
    for axes, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms, strict=True):
        cells = heat_map(arm)
        depths = sorted({depth for row in cells.values() for depth in row})
        shares = [[row.get(depth, float("nan")) for row in cells.values()] for depth in depths]
        axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(arm.name, fontsize=9)
        axes.set_xticks(range(len(cells)), [f"{tokens:,}" for tokens in cells])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("tokens")
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="w" if share < 0.6 else "k")
    return figure
