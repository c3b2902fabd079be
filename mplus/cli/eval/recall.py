"""``mplus eval ... --recipe``: measurements in the little language of facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mplus.evaluation.recall.facts import Telling
    from mplus.evaluation.reports.report import Report

RECIPES = ("recall-tiny", "recall-long")
STREAMS = 64
"""Most memories at a time; further questions are put to them later."""
LONG_AGES = (0, 8, 32, 128, 500, 1000, 2000)
WINDOW = 64


def load(recipe: str, model: Path | None, threads: int | None) -> Any:
    """The decoder to measure: what a run of the recipe left at ``model``, or the one that comes with mplus.

    Raises:
        ConfigError: a recipe of another language, or one whose decoder does not come with mplus.
    """
    import torch

    from mplus.errors import ConfigError
    from mplus.hf.pretrained.load import load_with_tokenizer
    from mplus.hf.pretrained.shipped import load_recall

    if recipe not in RECIPES:
        raise ConfigError(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    if model is not None:
        return load_with_tokenizer(model, tokenizer=None, device=None, dtype="auto")[0].eval()
    if recipe != "recall-tiny":
        raise ConfigError(f"the decoder of {recipe} does not come with mplus: train it, and give its folder as --model")
    return load_recall()[0]


def telling(recipe: str, ages: Sequence[int] | None, questions: int, held_out: bool, seed: int) -> Telling:
    """What is told and asked: ``questions`` at each age, rounded up to a multiple of the memories at a time."""
    from mplus.evaluation.recall.facts import Telling

    streams = min(STREAMS, questions)
    chosen: dict[str, Any] = {"streams": streams, "rounds": -(-questions // streams)}
    if ages is not None or recipe == "recall-long":
        chosen["ages"] = tuple(ages or LONG_AGES)
    return Telling(**chosen, held_out=held_out, seed=seed)


def recall_retention(
    recipe: str,
    model: Path | None,
    ages: Sequence[int] | None,
    arms: Sequence[str] | None,
    questions: int,
    held_out: bool,
    window_tokens: int | None,
    seed: int,
    threads: int | None,
) -> Report:
    """Accuracy over age for every arm."""
    from mplus.environment import run_info
    from mplus.evaluation.recall.retention import retention

    decoder = load(recipe, model, threads)
    return retention(
        decoder,
        telling(recipe, ages, questions, held_out, seed),
        window_tokens=window_tokens or WINDOW,
        arms=arms,
        circumstances=run_info(model=recipe if model is None else model.name, seed=seed),
    )


OLD = (48, 64, 96, 128)
"""Ages at which the short-term memory of recall-tiny has dropped every fact: only retrieval can answer."""
QUESTIONS = 256
"""At each age, for what needs no more."""


def recall_health(
    recipe: str,
    model: Path | None,
    ages: Sequence[int] | None,
    retrieved_tokens: Sequence[int] | None,
    retriever: Sequence[str] | None,
    seed: int,
    threads: int | None,
) -> dict[str, Any]:
    """What the retriever brings back, against others."""
    from mplus.cli.eval.options import retrievers
    from mplus.environment import run_info
    from mplus.evaluation.recall.health import retriever_health

    decoder = load(recipe, model, threads)
    told = telling(recipe, ages or OLD, QUESTIONS, held_out=False, seed=seed)
    others = retrievers(decoder, retriever)
    others.pop("random", None)  # there in any case
    found = retriever_health(decoder, told, retrieved_tokens=retrieved_tokens, retrievers=others)
    return {**found, "circumstances": run_info(model=recipe if model is None else model.name, seed=seed)}


def recall_abstention(
    recipe: str, model: Path | None, ages: Sequence[int] | None, seed: int, threads: int | None
) -> dict[str, Any]:
    """How well it can be told that a fact was never told."""
    from mplus.environment import run_info
    from mplus.evaluation.recall.abstention import abstention

    decoder = load(recipe, model, threads)
    found = abstention(decoder, telling(recipe, ages, QUESTIONS, held_out=False, seed=seed))
    return {**found, "circumstances": run_info(model=recipe if model is None else model.name, seed=seed)}
