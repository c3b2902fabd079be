"""Several reports as one: arms of memories trained apart side by side, or the questions of several seeds pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from attrs import evolve

from mplus.errors import InputError
from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.tables import flat

V = TypeVar("V")
OWN = ("memory", "arms", "window_tokens", "long_term_tokens")
"""Settings that belong to a memory. All others say what is told, asked and counted, and must agree."""


def side_by_side(reports: Mapping[str, tuple[Report, str]]) -> Report:
    """Return one report with an arm of each.

    What the reports have in common is kept. Settings of ``OWN`` and circumstances that differ are found under the new
    names; a borderline, chance or theory that differs is left out.

    Args:
        reports: new name -> a report, and which of its arms is to be found under this name.

    Raises:
        InputError: no report, no such arm, or reports in which other things were told, asked or counted.
    """
    if not reports:
        raise InputError("there must be at least one report to put beside others, got none")
    given = {name: report for name, (report, _) in reports.items()}
    first = next(iter(given))
    for name, report in given.items():
        found = _differences(given[first], report)
        if found:
            raise InputError(
                f"reports beside each other must be of the same questions, {first!r} and {name!r} differ in "
                f"{', '.join(found[:4])}: measure both with the same options"
            )
    settings = {key: value for key, value in given[first].settings.items() if key not in OWN}
    for key in OWN:
        found_in = {name: report.settings[key] for name, report in given.items() if key in report.settings}
        if found_in:
            settings[key] = _common(list(found_in.values()), found_in)
    circumstances = [report.circumstances for report in given.values()]
    return Report(
        protocol=given[first].protocol,
        arms=tuple(evolve(report.arm(arm), name=name) for name, (report, arm) in reports.items()),
        age_tokens=given[first].age_tokens,
        chance=_common([report.chance for report in given.values()], None),
        borderline=_common([report.borderline for report in given.values()], None),
        theory=_common([report.theory for report in given.values()], ()),
        settings=settings,
        deviations=tuple(dict.fromkeys(text for report in given.values() for text in report.deviations)),
        circumstances=_common(circumstances, dict(zip(given, circumstances, strict=True))),
    )


def _differences(one: Report, other: Report) -> list[str]:
    """Return the names of what two reports do not agree on."""
    plain = [
        flat({"protocol": report.protocol, "age_tokens": {str(a): t for a, t in report.age_tokens.items()}})
        | flat({key: value for key, value in report.settings.items() if key not in OWN})
        for report in (one, other)
    ]
    return sorted(name for name in plain[0].keys() | plain[1].keys() if plain[0].get(name) != plain[1].get(name))


def _common(values: Sequence[V], otherwise: V) -> V:
    """Return the value that all are equal to, or ``otherwise``."""
    return values[0] if all(value == values[0] for value in values) else otherwise


def pool(reports: Sequence[Report]) -> Report:
    """Return one report of all questions of ``reports``, whose counts add up.

    Settings and circumstances are those of the first. An arm that is not "ok" in one of them is not "ok" in the result,
    for the first such reason.

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
