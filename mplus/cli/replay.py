"""``mplus replay``: does everything that was recorded of the published code again, and compares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from mplus.interop.comparison import CaseReport

NOTHING = "none in this case"


def replay(
    folder: Annotated[Path, typer.Argument(help="A case, or a folder of cases.", show_default=False)],
    backend: Annotated[str, typer.Option(help="Attention backend: auto, reference, sdpa, or a plug-in's.")] = "auto",
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Numbers to compute with.")] = "float32",
    reset: Annotated[
        bool, typer.Option("--reset", help="Start every step from the recorded state instead of the own one.")
    ] = False,
) -> None:
    """Replay golden traces of the published code with variant "published" and compare.

    Exits with status 1 when an error exceeds 2e-5, or when retrieved ids, generated tokens, counters or recall
    frequencies differ.
    """
    import torch
    from rich.console import Console

    from mplus.interop.comparison import TOLERANCE
    from mplus.interop.golden import replay_cases

    console = Console()
    reports = []
    with console.status("") as status:
        for report in replay_cases(
            folder,
            backend,
            getattr(torch, dtype),
            reset=reset,
            progress=lambda case, step, steps: status.update(f"{case}: step {step} of {steps}"),
        ):
            reports.append(report)
            verdict = "passed" if report.passed(TOLERANCE) else "FAILED"
            what = f"{report.steps} steps replayed ({report.backend}, {report.dtype})"
            console.print(f"{report.name}: {verdict}, {what}", highlight=False)
            console.print(_table(report, TOLERANCE), "")
    passed = sum(report.passed(TOLERANCE) for report in reports)
    console.print(f"{passed} of {len(reports)} cases passed (largest error allowed: {TOLERANCE:g})")
    if passed < len(reports):
        raise typer.Exit(1)


def _table(report: CaseReport, tolerance: float) -> Table:
    """Tabulate what was compared in one case; what is off, with the place of its largest or first difference."""
    from rich.table import Table

    from mplus.interop.comparison import EQUAL, MEASURED

    table = Table(box=None, show_header=False)
    for quantity in MEASURED:
        error = report.errors.get(quantity)
        off = error is not None and error > tolerance
        result = NOTHING if error is None else f"max abs error {error:.1e}"
        table.add_row(quantity, result, report.differences.get(quantity, "") if off else "", style=_style(error, off))
    for quantity in EQUAL:
        same = report.equal.get(quantity)
        result = NOTHING if same is None else "equal" if same else "different"
        off = same is False
        table.add_row(quantity, result, report.differences.get(quantity, "") if off else "", style=_style(same, off))
    return table


def _style(found: object, off: bool) -> str | None:
    return "red" if off else "dim" if found is None else None
