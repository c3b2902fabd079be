"""``mplus eval``: retention, retriever, abstention and harm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mplus.cli.eval_options import (
    QUESTIONS,
    Device,
    Dtype,
    EvalOptions,
    Json,
    Model,
    Seed,
    Threads,
    Tokenizer,
    assignment,
    experiment,
    numbers,
    prepare,
    set_threads,
    show_plain,
    show_report,
)
from mplus.errors import ConfigError

if TYPE_CHECKING:
    from mplus.evaluation import texts
    from mplus.hf.model.model_class import MemoryModel
    from mplus.retrievers.base import Retriever


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


OLD = (48, 64, 96, 128)
"""Ages at which the short-term memory of recall-tiny has dropped every fact: only retrieval can answer."""


@experiment({"retrieved_tokens": "tokens", "retriever": "tokens"}, with_recipe=("retrieved_tokens", "retriever"))
def retriever(
    options: EvalOptions,
    retrieved_tokens: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Rows a read brings back; default: 1/4 to 4 times as configured."),
    ] = None,
    retriever: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Retrievers to read with besides the decoder's own; default: all usable. One with options is given "
            "by itself, as 'faiss_ivf least=64 probes=2'. May be repeated.",
        ),
    ] = None,
) -> None:
    """Does the retriever bring back what a question needs, per layer and against others, and does that decide?

    For every retriever: gold recall, accuracy, the share of the exact best rows that it finds, and the time it takes.
    """
    from mplus.evaluation.execution import ParallelStreams
    from mplus.evaluation.health import retriever_health

    tried = numbers(retrieved_tokens, "--retrieved-tokens")
    with_recipe = options.recipe is not None
    execution = options.facts(QUESTIONS, usual_ages=OLD) if with_recipe else options.generated_answers()
    others = retrievers(execution.model, retriever)
    if isinstance(execution, ParallelStreams):
        others.pop("random", None)  # there in any case
    report = retriever_health(execution, retrieved_tokens=tried, retrievers=others, name=options.name)
    show_plain(report, options.as_json)


def retrievers(model: MemoryModel, given: Sequence[str] | None) -> dict[str, Retriever]:
    """Return the retrievers that are asked for by ``--retriever``, by what was given; None: all usable ones.

    Raises:
        As ``mplus.evaluation.retriever_swap.retriever_for``.
    """
    from mplus.evaluation.retriever_swap import usable, with_own_parameters

    if given is None:
        return usable(model)
    found = {}
    for text in given:
        for one in text.split(",") if "=" not in text else [text]:
            words = one.split()
            if not words:
                raise ConfigError(f"--retriever must be names with commas between, or one with options, got {text!r}")
            found[" ".join(words)] = with_own_parameters(model, words[0], **dict(map(assignment, words[1:])))
    return found


@experiment({"untold": "ages"})
def abstention(
    options: EvalOptions,
    untold: Annotated[int, typer.Option(min=1, help="Questions per episode whose answer was never told.")] = 1,
) -> None:
    """Can it be told that an answer is not in memory? Signs compared and combined: AUROC and abstention accuracy.

    Calibrated on every other episode, judged on the rest.
    """
    from mplus.evaluation.abstention import abstention as run

    with_recipe = options.recipe is not None
    execution = options.facts(QUESTIONS, untold=True) if with_recipe else options.generated_answers(untold=untold)
    show_plain(run(execution, name=options.name), options.as_json)


def harm(
    model: Model,
    text: Annotated[Path, typer.Option(help="Held-out text to predict (.txt or .gz).", show_default=False)],
    unrelated: Annotated[
        Path, typer.Option(help="Text from elsewhere that is written into memory (.txt or .gz).", show_default=False)
    ],
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each piece of held-out text.")] = 256,
    known_tokens: Annotated[
        int, typer.Option(min=1, help="Of them, read but not predicted; retrieval sees these alone.")
    ] = 16,
    pieces: Annotated[int, typer.Option(min=1, help="Most pieces.")] = 64,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="Memory of a decoder that has none: a mechanism, MECHANISM:RETRIEVER, a config as JSON, or "
            "LABEL=FOLDER of one that was trained.",
            show_default=False,
        ),
    ] = None,
    unrelated_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to write; default: as many as fill the memory.")
    ] = None,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = None,
) -> None:
    """Perplexity without memory, with an empty one, and with one full of unrelated text: what carrying it costs."""
    from mplus.evaluation.harm import HarmOptions
    from mplus.evaluation.harm import harm as run
    from mplus.evaluation.texts import read

    if memory is None:
        decoder, words = prepare(model, tokenizer, device, dtype, threads)
    else:
        decoder, words = _wrapped(model, memory, tokenizer, device, dtype, threads)
    options = HarmOptions(
        text_tokens=text_tokens,
        known_tokens=known_tokens,
        pieces=pieces,
        unrelated_tokens=unrelated_tokens,
        bos=getattr(words, "bos_token_id", None),
        seed=seed,
    )
    show_plain(run(decoder, words, read(text), read(unrelated), options=options, name=model.name), as_json)


def _wrapped(
    model: Path, label: str, tokenizer: str | None, device: str | None, dtype: str, threads: int | None
) -> tuple[MemoryModel, texts.Tokenizer]:
    """Return a decoder that has no memory yet, wrapped for the memory of this label, and its tokenizer."""
    from mplus.evaluation.chat.memories import memory_configs
    from mplus.hf.model.wrapping import wrap
    from mplus.hf.pretrained.load import from_pretrained, load_decoder_with_tokenizer

    if threads is not None:
        set_threads(threads)
    configs = list(memory_configs([label]).values())
    if len(configs) != 1:
        raise ConfigError(f"--memory must be the label of one memory, got {label!r}, which is {len(configs)}")
    if tokenizer is not None:
        raise ConfigError(f"--memory goes with the tokenizer in the folder of the decoder, got {tokenizer!r} besides")
    decoder, words = load_decoder_with_tokenizer(model, device=device, dtype=dtype)
    (config,) = configs
    wrapped = from_pretrained(config, base=decoder) if isinstance(config, Path) else wrap(decoder, config)
    return cast("MemoryModel", wrapped), cast("texts.Tokenizer", words)
