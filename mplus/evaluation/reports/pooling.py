"""Several reports of the same protocol as one: counts add up, so an interval is that of all questions."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve

from mplus.errors import InputError
from mplus.evaluation.reports.report import Arm, Cell, Report


def pool(reports: Sequence[Report]) -> Report:
    """One report of all questions of ``reports``; settings and circumstances are those of the first.

    An arm that is not "ok" in one of them is not "ok" in the result, for the first such reason.

    Raises:
        InputError: there are none, or they differ in protocol or arms.
    """
    if not reports:
        raise InputError("there must be at least one report to pool, got none")
    first = reports[0]
    names = [arm.name for arm in first.arms]
    for other in reports[1:]:
        if other.protocol != first.protocol or [arm.name for arm in other.arms] != names:
            raise InputError(
                f"reports to pool must have the same protocol and arms, got {first.protocol} with {', '.join(names)} "
                f"and {other.protocol} with {', '.join(arm.name for arm in other.arms)}"
            )
    arms = tuple(_pooled([report.arm(name) for report in reports]) for name in names)
    known = [report.borderline for report in reports if report.borderline is not None]
    return evolve(first, arms=arms, borderline=sum(known) / len(known) if known else None)


def _pooled(arms: Sequence[Arm]) -> Arm:
    bad = next((arm for arm in arms if arm.status != "ok"), None)
    cells: dict[int, list[Cell]] = {}
    for arm in arms:
        for cell in arm.cells:
            cells.setdefault(cell.age, []).append(cell)
    return Arm(
        name=arms[0].name,
        status="ok" if bad is None else bad.status,
        reason=None if bad is None else bad.reason,
        cells=tuple(_sum(some) for some in cells.values()),
    )


def _sum(cells: Sequence[Cell]) -> Cell:
    return Cell(
        age=cells[0].age,
        questions=sum(cell.questions for cell in cells),
        correct=sum(cell.correct for cell in cells),
        state_bytes=max((c.state_bytes for c in cells if c.state_bytes is not None), default=None),
        tokens_attended=max((c.tokens_attended for c in cells if c.tokens_attended is not None), default=None),
    )
