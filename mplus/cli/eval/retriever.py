"""``mplus eval retriever``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplus.cli.eval.options import QUESTIONS, EvalOptions, assignment, experiment, numbers, show_plain
from mplus.errors import ConfigError

if TYPE_CHECKING:
    from mplus.retrievers.base import Retriever

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


def retrievers(model: Any, given: Sequence[str] | None) -> dict[str, Retriever]:
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
