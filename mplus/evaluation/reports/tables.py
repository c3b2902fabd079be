"""A report as a table: in Markdown and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from mplus.config import JsonValue
from mplus.evaluation.reports.report import Arm, Report


def grid(report: Report, ages: Sequence[int] | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the arms with status "ok" and of theory, for all ages or some."""
    ages = report.ages if ages is None else ages
    head = ["arm", *map(str, ages), "state", "attended"]
    rows = []
    if report.age_tokens:
        rows.append(["(age in tokens)", *(_count(report.age_tokens.get(age)) for age in ages), "", ""])
    rows += [_row(arm, ages) for arm in report.arms if arm.status == "ok"]
    rows += [
        [f"{curve.name} (theory)", *(_share(curve.accuracy_by_age.get(age)) for age in ages), "", ""]
        for curve in report.theory
    ]
    return head, rows


def markdown(report: Report) -> str:
    """Return a Markdown table of accuracy over age; under it remarks, settings and circumstances."""
    head, rows = grid(report)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    parts = [table, "\n".join(f"- {remark}" for remark in remarks(report))]
    for title, facts in (("Settings", report.settings), ("Circumstances", report.circumstances)):
        if facts:
            parts += [f"{title}:", "\n".join(f"- {name}: `{value}`" for name, value in flat(facts).items())]
    return "\n\n".join(filter(None, parts)) + "\n"


def show(report: Report, console: Console) -> None:
    """Print the table, in parts where the console is narrow, then what each arm costs, remarks and settings."""
    ages = report.ages
    parts = _fitting(report, ages, console)
    console.print(f"[bold]accuracy over age in chunks[/] ({report.protocol})")
    for part in parts:
        console.print(_table(report, part), "")
    costs = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (("arm", "left"), ("state", "right"), ("attended", "right"), ("reach at 0.90", "right")):
        costs.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for arm in report.arms:
        if arm.status == "ok":
            reach = report.reach(arm.name)
            costs.add_row(
                arm.name, size(arm.state_bytes), _count(arm.tokens_attended), "" if reach is None else f"{reach:,.1f}x"
            )
    console.print(costs, "")
    for remark in remarks(report):
        console.print(f"- {escape(remark)}")
    for title, facts in (("settings", report.settings), ("circumstances", report.circumstances)):
        if facts:
            console.print(f"\n[bold]{title}[/]")
        for name, value in flat(facts).items():
            console.print(f"  {escape(name)}: {escape(value)}", soft_wrap=True)


def _fitting(report: Report, ages: Sequence[int], console: Console) -> list[Sequence[int]]:
    """Return the ages in as few parts as the console is wide enough for."""
    wide = console.options.update(max_width=10_000)
    for parts in range(1, len(ages) + 1):
        size_of = -(-len(ages) // parts)
        split = [ages[start : start + size_of] for start in range(0, len(ages), size_of)]
        if all(Measurement.get(console, wide, _table(report, part)).maximum <= console.width for part in split):
            return split
    return [[age] for age in ages]


def _table(report: Report, ages: Sequence[int]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    head, rows = grid(report, ages)
    table.add_column(head[0], no_wrap=True)
    for name in head[1:-2]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        short = [_short(cell) for cell in row[1:-2]]
        table.add_row(*map(escape, [row[0], *short]), style="dim" if row[0].endswith(")") else None)
    return table


def remarks(report: Report) -> list[str]:
    """Return the notes below the table: chance, formulas, arms without numbers, deviations."""
    found = []
    for name, value in (("chance", report.chance), ("borderline (told nothing)", report.borderline)):
        if value is not None:
            found.append(f"{name}: {value:.3f}")
    cells = [cell for arm in report.arms for cell in arm.cells if arm.status == "ok"]
    if cells:
        fewest = min(cell.questions for cell in cells)
        widest = max((cell.interval[1] - cell.interval[0]) / 2 for cell in cells)
        found.append(f"at least {fewest:,} questions a cell; 95 % intervals of at most ±{widest:.3f}")
    found += [f"theory, {curve.name}: {curve.formula}, n = age in chunks" for curve in report.theory]
    found += [without_numbers(arm) for arm in report.arms if arm.status != "ok"]
    found += [f"differs from the published protocol: {deviation}" for deviation in report.deviations]
    return found


def without_numbers(arm: Arm) -> str:
    """Return for example ``window: not converged (0.71 inside itself)``."""
    return f"{arm.name}: {arm.status.replace('_', ' ')} ({arm.reason})"


def flat(facts: Mapping[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """Flatten nested facts to ``name.of.fact`` -> JSON of its value."""
    found: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = json.dumps(value, ensure_ascii=False)
    return found


def size(count: int | None) -> str:
    """Format bytes in the unit that fits."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _row(arm: Arm, ages: Sequence[int]) -> list[str]:
    cells = [arm.at(age) for age in ages]
    shares = [_share(None if cell is None else cell.accuracy) for cell in cells]
    return [arm.name, *shares, size(arm.state_bytes), _count(arm.tokens_attended)]


def _short(cell: str) -> str:
    """Format a number like ``.97`` or ``2.0k``: room is scarce on a terminal."""
    if "." in cell:
        return "1.0" if cell == "1.00" else cell.removeprefix("0")
    if "," not in cell:
        return cell
    thousands = int(cell.replace(",", "")) / 1000
    return f"{thousands:.1f}k" if thousands < 10 else f"{thousands:,.0f}k"


def _share(value: float | None) -> str:
    """Format a share with two places, never rounded up to 1."""
    return "" if value is None else f"{value if value == 1 else min(value, 0.99):.2f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
