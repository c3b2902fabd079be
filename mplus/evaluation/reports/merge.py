"""Arms of several reports beside each other: memories that were trained each by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve

from mplus.errors import InputError
from mplus.evaluation.reports.report import Report
from mplus.evaluation.reports.tables import flat

OWN = ("memory", "arms", "window_tokens", "long_term_tokens")
"""Settings that belong to a memory. All others say what is told, asked and counted, and must agree."""


def beside(reports: Mapping[str, tuple[Report, str]]) -> Report:
    """One report with an arm of each.

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
    """Names of what two reports do not agree on."""
    plain = [
        flat({"protocol": report.protocol, "age_tokens": {str(a): t for a, t in report.age_tokens.items()}})
        | flat({key: value for key, value in report.settings.items() if key not in OWN})
        for report in (one, other)
    ]
    return sorted(name for name in plain[0].keys() | plain[1].keys() if plain[0].get(name) != plain[1].get(name))


def _common(values: list[Any], otherwise: Any) -> Any:
    """The value that all are equal to, or ``otherwise``."""
    return values[0] if all(value == values[0] for value in values) else otherwise
