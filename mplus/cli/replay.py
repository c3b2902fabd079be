"""``mplus replay``: do everything again that was recorded of published code, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mplus.interop.report import CaseReport

NOTHING = "none in this case"


def replay(
    folder: Annotated[
        Path, typer.Argument(help="A case, a JSON file of cases, or a folder of both.", show_default=False)
    ],
    backend: Annotated[str, typer.Option(help="Attention backend: auto, reference, sdpa, or a plug-in's.")] = "auto",
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Numbers to compute with.")] = "float32",
    reset: Annotated[
        bool, typer.Option("--reset", help="Start every step from the recorded state instead of the own one.")
    ] = False,
) -> None:
    """Replay golden traces of published code and compare: those of M+ and MemoryLLM with variant "published".

    Each case is played by the trace player of the model in its steps.json, or of the system that a JSON file of cases
    names; a package announces one of its own in the entry-point group mplus.replays. Says what was compared, the
    largest error and the error allowed, and what was skipped and why. Exits with status 1 when an error exceeds the
    bound of its case (2e-5 for M+ and MemoryLLM), when something differs that must be equal, such as retrieved ids,
    generated tokens, counters or recall frequencies, or when no installed package plays one of several cases; the
    others are played all the same.
    """
    import torch
    from rich.console import Console

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
            if report.unplayed is None:
                _print(console, report)
    passed = sum(report.passed() for report in reports)
    skipped = sum(len(report.skipped) for report in reports)
    without = f"; {skipped} steps skipped, as named above" if skipped else ""
    console.print(f"{passed} of {len(reports)} cases passed{without}", highlight=False)
    for report in reports:
        if report.unplayed is not None:
            console.print(f"{report.name}: NOT PLAYED: {report.unplayed}", style="red", highlight=False, markup=False)
    if passed < len(reports):
        raise typer.Exit(1)


def _print(console: Console, report: CaseReport) -> None:
    """Print the verdict on one case, what was compared in it and what was skipped."""
    verdict = "passed" if report.passed() else "FAILED"
    worst = f"; largest error {report.worst:.1e}, allowed {report.tolerance:g}" if report.errors else ""
    what = f"{report.steps} steps replayed ({report.backend}, {report.dtype}){worst}"
    console.print(f"{report.name}: {verdict}, {what}", highlight=False, soft_wrap=True)
    console.print(_table(report))
    for step, reason in report.skipped.items():
        console.print(f"  skipped: {step}: {reason}", style="yellow", highlight=False, markup=False)
    console.print("")


def _table(report: CaseReport) -> Table:
    """Tabulate what was compared in one case; what is off, with the place of its largest or first difference."""
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for quantity in report.quantities:
        error, same = report.errors.get(quantity), report.equal.get(quantity)
        off = same is False or (error is not None and error > report.bound(quantity))
        if error is not None:
            own = f" (allowed {report.bound(quantity):g})" if quantity in report.tolerances else ""
            result = f"max {'abs ' if report.scale == 'none' else ''}error {error:.1e}{own}"
            result += ", the rest different" if same is False else ""
        else:
            result = NOTHING if same is None else "equal" if same else "different"
        style = "red" if off else "dim" if result == NOTHING else None
        table.add_row(quantity, result, report.differences.get(quantity, "") if off else "", style=style)
    return table
