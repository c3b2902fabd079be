"""``mplus eval retention``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mplus.cli.eval.options import (
    Ages,
    Device,
    Dtype,
    Episodes,
    Json,
    OptionalData,
    OptionalModel,
    ProtocolName,
    RecipeName,
    Seed,
    Set,
    Streams,
    Threads,
    Tokenizer,
    Tokens,
    both,
    check_given,
    make_protocol,
    numbers,
    prepare,
    show_report,
)


def retention(
    context: typer.Context,
    model: OptionalModel = None,
    data: OptionalData = None,
    recipe: RecipeName = None,
    questions: Annotated[int, typer.Option(min=1, help="With --recipe: questions at each age.")] = 1024,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="With --recipe: of people never seen in training.")
    ] = False,
    protocol: ProtocolName = "squad",
    settings: Set = None,
    episodes: Episodes = 100,
    ages: Ages = None,
    arms: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help="Arms to run; default: all that can.")
    ] = None,
    tokens: Tokens = None,
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
    streams: Streams = 8,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = None,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw the curves into this file (.png or .svg). May be repeated.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown to this file.")] = None,
) -> None:
    """Tell, distract, ask: accuracy over age for the memory and for its baselines, on the same decoder.

    Prints the table and every setting that decides it.
    """
    from mplus.cli.eval.recall import recall_retention
    from mplus.evaluation.arms import ArmOptions
    from mplus.evaluation.generating import Generation
    from mplus.evaluation.metrics.scoring import Scoring
    from mplus.evaluation.reports.plots import check_paths
    from mplus.evaluation.reports.report import ARMS
    from mplus.evaluation.retention import RetentionOptions
    from mplus.evaluation.retention import retention as run

    check_given(context, recipe, "arms", "window_tokens", "plot", "markdown")
    check_paths(plot or ())  # before the work, not after it
    if recipe is not None:
        names = None if arms is None else [name.strip() for name in arms.split(",")]
        told = numbers(ages, "--ages")
        show_report(
            recall_retention(recipe, model, told, names, questions, held_out, window_tokens, seed, threads),
            as_json,
            plot,
            markdown,
        )
        return
    model, data = both(model, data)
    scoring = Scoring(
        correct=correct,  # type: ignore[arg-type]  # checked there
        normalise=normalise,  # type: ignore[arg-type]
        stop=tuple(text.replace("\\n", "\n") for text in stop) if stop else ("\n",),
    )
    options = RetentionOptions(ages=numbers(ages, "--ages"), streams=streams, seed=seed, export=export)
    wanted = ArmOptions(
        arms=ARMS if arms is None else tuple(name.strip() for name in arms.split(",")),
        window_tokens=window_tokens,
        window_converged=window_converged,
        bm25_passages=bm25_passages,
        bm25_tokens=bm25_tokens,
        positions=positions,
        snapkv_answers=snapkv,
        seed=seed,
    )
    decoder, words = prepare(model, tokenizer, device, dtype, threads)
    given = {"data": data, "episodes": episodes, "seed": seed}
    made = make_protocol(protocol, words, settings, decoder.mplus_config.chunk_tokens, given)
    generation = Generation.of(words, tokens=tokens or made.answer_tokens)
    report = run(
        decoder, words, made, options=options, arms=wanted, generation=generation, scoring=scoring, name=model.name
    )
    show_report(report, as_json, plot, markdown)
