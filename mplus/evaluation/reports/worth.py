"""What memories are worth to a decoder: one row for each arm, beside what the right text alone is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict, cast

from rich.console import Console
from rich.markup import escape

from mplus.evaluation.reports.cell import wilson
from mplus.evaluation.reports.paired import Estimate, difference, outcomes, ratio
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.tables import flat, grid, without_numbers

UNTOLD = ("arm", "questions", "AUROC, likelihood", "AUROC, score", "nothing came back", "same, of told")
"""Headings about questions that were never told."""
HEAD = ("arm", "right", "95 %", "of the ceiling", "evidence", "first token", "state / token")


class CategoryFacts(TypedDict):
    """Counts and scores of the questions of one category, see ``mplus.evaluation.chat.findings.by_category``."""

    questions: int
    correct: int
    f1: float
    recall: NotRequired[float]


class UntoldFacts(TypedDict):
    """Signs of what was never told, see ``mplus.evaluation.chat.findings.signs_of_told``."""

    questions: int
    auroc_of_likelihood: NotRequired[float]
    auroc_of_score: NotRequired[float]
    nothing_brought_back: NotRequired[dict[str, float]]


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
    # Ages may have different numbers of questions.
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
    """Return the notes below the tables: rows beside the same chunks as text, digests of memories, missing arms."""
    memories = cast("dict[str, dict[str, Any]]", report.settings.get("memory", {}))
    found = [
        f"config of {label}: digest {config['digest']}" for label, config in memories.items() if "digest" in config
    ]
    answers = {arm.name: outcomes(arm) for arm in report.arms if arm.status == "ok"}
    for name, own in answers.items():
        if own and (text := answers.get(f"{name}-text")):
            less = difference(own, text)
            found.append(
                f"{name} less {name}-text, question by question: {less.value:+.2f} [{less.low:+.2f}, {less.high:+.2f}]"
            )
    return found + [without_numbers(arm) for arm in report.arms if arm.status != "ok"]


def worth_tables(report: Report) -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """Return title -> headings and rows of every table: of all questions, by age, by category, of what was not told."""
    found: dict[str, tuple[Sequence[str], list[list[str]]]] = {"all questions": (HEAD, worth_rows(report))}
    arms = [arm for arm in report.arms if arm.status == "ok"]
    if len(report.ages) > 1 and not any("by_category" in arm.details for arm in arms):
        head, rows = grid(report)
        found["right, by passages told since"] = (head[:-2], [row[:-2] for row in rows])
    kinds = {arm.name: cast("dict[str, CategoryFacts]", arm.details.get("by_category", {})) for arm in arms}
    names = list(dict.fromkeys(name for some in kinds.values() for name in some))
    if names:
        cells = {arm: [_category(some.get(name)) for name in names] for arm, some in kinds.items()}
        found["right / F1 by category"] = (("arm", *names), [[arm, *row] for arm, row in cells.items()])
    untold = {arm.name: cast("UntoldFacts", arm.details["untold"]) for arm in arms if "untold" in arm.details}
    if untold:
        found["never told"] = (UNTOLD, [[arm, *_untold(facts)] for arm, facts in untold.items()])
    return found


def _category(facts: CategoryFacts | None) -> str:
    return "" if facts is None else f"{facts['correct']}/{facts['questions']} / {facts['f1']:.2f}"


def _untold(facts: UntoldFacts) -> list[str]:
    nothing = facts.get("nothing_brought_back")
    aurocs = facts.get("auroc_of_likelihood"), facts.get("auroc_of_score")
    return [
        str(facts["questions"]),
        *("" if value is None else f"{value:.2f}" for value in aurocs),
        *("" if nothing is None else f"{nothing[kind]:.2f}" for kind in ("untold", "told")),
    ]


def worth_markdown(report: Report) -> str:
    """Return the tables in Markdown, with remarks and all settings."""
    parts = []
    for title, (head, rows) in worth_tables(report).items():
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        parts += [f"{title}:", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    parts.append("\n".join(f"- {remark}" for remark in worth_remarks(report)))
    for title, facts in (("Settings", report.settings), ("Circumstances", report.circumstances)):
        parts += [f"{title}:", "\n".join(f"- {name}: `{value}`" for name, value in flat(facts).items())]
    return "\n\n".join(filter(None, parts)) + "\n"


def show_worth(report: Report, console: Console) -> None:
    """Print the tables, remarks and circumstances."""
    console.print(f"[bold]what a memory is worth[/] ({report.protocol})")
    for title, (head, rows) in worth_tables(report).items():
        console.print(f"\n{title}")
        lines = [head, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            console.print(
                escape("  ".join(cells)), soft_wrap=True
            )  # a narrow terminal breaks lines, numbers stay whole
    console.print()
    for remark in worth_remarks(report):
        console.print(f"- {escape(remark)}", soft_wrap=True)
    console.print("\n[bold]circumstances[/]")
    for name, value in flat(report.circumstances).items():
        console.print(f"  {escape(name)}: {escape(value)}", soft_wrap=True)
