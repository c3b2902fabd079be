"""``mplus eval retention``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mplus.cli.eval.options import EvalOptions, experiment, show_report

ANSWERING = (
    *("stop", "correct", "normalise", "window_tokens", "window_converged", "bm25_passages", "bm25_tokens"),
    *("positions", "export", "snapkv"),
)


@experiment(
    {"questions": "protocol", "held_out": "protocol", "arms": "tokens", **dict.fromkeys(ANSWERING, "streams")},
    with_recipe=("arms", "window_tokens", "plot", "markdown"),
)
def retention(
    options: EvalOptions,
    questions: Annotated[int, typer.Option(min=1, help="With --recipe: questions at each age.")] = 1024,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="With --recipe: of people never seen in training.")
    ] = False,
    arms: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help="Arms to run; default: all that can.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help=r"An answer ends before this text; \n is a line break. May be repeated; default: \n."),
    ] = None,
    correct: Annotated[
        str, typer.Option(help="An answer counts when it contains the right one, contains_words, or is exact.")
    ] = "contains",
    normalise: Annotated[
        str, typer.Option(help="Before comparing: none, or squad (case, punctuation and articles do not count).")
    ] = "none",
    window_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the plain window; default: as many as M+ attends to.")
    ] = None,
    window_converged: Annotated[
        float, typer.Option(help="A window that answers less of what is inside it is not drawn.")
    ] = 0.98,
    bm25_passages: Annotated[int, typer.Option(min=1, help="Most passages BM25 puts before a question.")] = 4,
    bm25_tokens: Annotated[
        int | None, typer.Option(min=1, help="Room for them in tokens; default: what the decoder's positions leave.")
    ] = None,
    positions: Annotated[
        int | None,
        typer.Option(min=1, help="Positions of the decoder, for full context and BM25; default: as configured."),
    ] = None,
    export: Annotated[Path | None, typer.Option(help="Write the questions for benchmarks/snapkv to this file.")] = None,
    snapkv: Annotated[Path | None, typer.Option(help="Answers of benchmarks/snapkv to the same questions.")] = None,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw the curves into this file (.png or .svg). May be repeated.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown to this file.")] = None,
) -> None:
    """Tell, distract, ask: accuracy over age for the memory and for its baselines, on the same decoder.

    Prints the table and every setting that decides it.
    """
    from mplus.evaluation.generating import Scoring
    from mplus.evaluation.options import ArmOptions
    from mplus.evaluation.reports.plots import check_paths
    from mplus.evaluation.retention import retention as run

    check_paths(plot or ())  # before the work, not after it
    wanted = ArmOptions(
        arms=None if arms is None else [name.strip() for name in arms.split(",")],
        window_tokens=window_tokens,
        window_converged=window_converged,
        bm25_passages=bm25_passages if options.recipe is None else None,
        bm25_tokens=bm25_tokens,
        positions=positions,
        snapkv_answers=snapkv,
        seed=options.seed,
    )
    if options.recipe is not None:
        report = run(options.facts(questions, held_out), wanted, name=options.name)
    else:
        scoring = Scoring(
            correct=correct,  # type: ignore[arg-type]  # checked there
            normalise=normalise,  # type: ignore[arg-type]
            stop=tuple(text.replace("\\n", "\n") for text in stop) if stop else ("\n",),
        )
        report = run(options.generated_answers(scoring, export), wanted, name=options.name)
    show_report(report, options.as_json, plot, markdown)
