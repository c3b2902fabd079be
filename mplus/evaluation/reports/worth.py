"""What memories are worth to a decoder: one row for each arm, beside what the right text alone is worth."""

from __future__ import annotations

from typing import Any, cast

from rich.console import Console
from rich.markup import escape

from mplus.evaluation.reports.cell import wilson
from mplus.evaluation.reports.paired import Estimate, outcomes, ratio
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.tables import flat, without_numbers

HEAD = ("arm", "right", "95 %", "of the ceiling", "evidence", "first token", "state / token")


def worth_rows(report: Report) -> list[list[str]]:
    """Return the rows of a table with the headings ``HEAD``, all ages together.

    - right: questions answered right, of those asked, and the interval of their share (Wilson);
    - of the ceiling: over what the right text alone answers, question by question (95 % interval by resampling);
    - evidence: share of the questions of which all that the answer needs was brought back;
    - first token: median milliseconds until it, one question at a time; over the time without memory;
    - state / token: bytes kept for each token told, over those of the decoder's own cache in bfloat16.
    """
    arms = {arm.name: arm for arm in report.arms if arm.status == "ok"}
    ceiling, alone = arms.get("ceiling"), arms.get("none")
    return [_row(arm, ceiling, _first_token(alone) if alone else None) for arm in arms.values()]


def _row(arm: Arm, ceiling: Arm | None, alone: float | None) -> list[str]:
    asked, right = sum(cell.questions for cell in arm.cells), sum(cell.correct for cell in arm.cells)
    low, high = wilson(right, asked)
    found = ratio(outcomes(arm), outcomes(ceiling)) if ceiling and outcomes(arm) and outcomes(ceiling) else None
    recalls = [(cell.recall, cell.questions) for cell in arm.cells if cell.recall is not None]
    recall = sum(share * count for share, count in recalls) / sum(count for _, count in recalls) if recalls else None
    first, details = _first_token(arm), cast("dict[str, Any]", arm.details)
    kept, cache = details.get("state_bytes_per_token"), details.get("cache_bytes_per_token_bf16")
    return [
        arm.name,
        f"{right}/{asked} {right / asked:.2f}",
        f"{low:.2f}-{high:.2f}",
        "" if found is None else _share(found),
        "" if recall is None else f"{recall:.2f}",
        "" if first is None else f"{first:,.0f} ms" + (f" {first / alone:.2f}x" if alone else ""),
        "" if kept is None else f"{kept:,.0f} B {kept / cache:.2f}x",
    ]


def _first_token(arm: Arm) -> float | None:
    """Return the milliseconds at the last age, where most has been told."""
    return next((cell.first_token_ms for cell in reversed(arm.cells) if cell.first_token_ms is not None), None)


def _share(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("inf", "-")


def worth_remarks(report: Report) -> list[str]:
    """Return what the table does not say: digests of memories, arms without numbers."""
    memories = cast("dict[str, dict[str, Any]]", report.settings.get("memory", {}))
    found = [
        f"config of {label}: digest {config['digest']}" for label, config in memories.items() if "digest" in config
    ]
    return found + [without_numbers(arm) for arm in report.arms if arm.status != "ok"]


def worth_markdown(report: Report) -> str:
    """Return the table in Markdown, with remarks and all settings."""
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *worth_rows(report)]
    parts = ["\n".join("| " + " | ".join(line) + " |" for line in lines)]
    parts.append("\n".join(f"- {remark}" for remark in worth_remarks(report)))
    for title, facts in (("Settings", report.settings), ("Circumstances", report.circumstances)):
        parts += [f"{title}:", "\n".join(f"- {name}: `{value}`" for name, value in flat(facts).items())]
    return "\n\n".join(filter(None, parts)) + "\n"


def show_worth(report: Report, console: Console) -> None:
    """Print the table, remarks and circumstances."""
    console.print(f"[bold]what a memory is worth[/] ({report.protocol})")
    rows = [HEAD, *worth_rows(report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print(escape("  ".join(cells)), soft_wrap=True)  # a narrow terminal breaks lines, numbers stay whole
    console.print()
    for remark in worth_remarks(report):
        console.print(f"- {escape(remark)}", soft_wrap=True)
    console.print("\n[bold]circumstances[/]")
    for name, value in flat(report.circumstances).items():
        console.print(f"  {escape(name)}: {escape(value)}", soft_wrap=True)
