"""``mplus replay``: do everything again that was recorded of published code, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from mplus.interop.golden import CaseReport

NOTHING = "none in this case"


def replay(
    folder: Annotated[Path, typer.Argument(help="A case, or a folder of cases.", show_default=False)],
    backend: Annotated[str, typer.Option(help="Attention backend: auto, reference, sdpa, or a plug-in's.")] = "auto",
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Numbers to compute with.")] = "float32",
    reset: Annotated[
        bool, typer.Option("--reset", help="Start every step from the recorded state instead of the own one.")
    ] = False,
) -> None:
    """Replay golden traces of published code and compare: those of M+ and MemoryLLM with variant "published".

    Each case is played by the trace player of the model in its steps.json; a package announces one for a model of its
    own in the entry-point group mplus.replays. Exits with status 1 when an error exceeds 2e-5, or when something
    differs that must be equal, such as retrieved ids, generated tokens, counters or recall frequencies.
    """
    import torch
    from rich.console import Console

    from mplus.interop.golden import TOLERANCE, replay_cases

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

    table = Table(box=None, show_header=False)
    for quantity in report.quantities:
        error, same = report.errors.get(quantity), report.equal.get(quantity)
        off = same is False or (error is not None and error > tolerance)
        if error is not None:
            result = f"max abs error {error:.1e}"
        else:
            result = NOTHING if same is None else "equal" if same else "different"
        style = "red" if off else "dim" if result == NOTHING else None
        table.add_row(quantity, result, report.differences.get(quantity, "") if off else "", style=style)
    return table
