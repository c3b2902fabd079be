"""Forgetting curves of a full short-term memory: every write replaces K of its N rows, drawn at random."""

from __future__ import annotations

from collections.abc import Iterable

from mplus.errors import InputError
from mplus.evaluation.reports.report import Curve


def one_row(age: int, new_rows: int, short_term: int) -> float:
    """Return ``(1 - K/N)^age``, the chance that a given row is still there (MemoryLLM section 3.1.2).

    Raises:
        InputError: unless 1 <= K <= N and age >= 0.
    """
    if not 1 <= new_rows <= short_term or age < 0:
        raise InputError(
            "the forgetting law needs 1 <= new_rows <= short_term and an age of at least 0, "
            f"got new_rows={new_rows}, short_term={short_term}, age={age}"
        )
    return float((1 - new_rows / short_term) ** age)


def any_row(age: int, new_rows: int, short_term: int, carriers: int | None = None) -> float:
    """Return ``1 - (1 - (1 - K/N)^age)^c``, the chance that any of the c rows which carry the fact is still there.

    Args:
        age: writes since the fact's own.
        new_rows: K, rows per write.
        short_term: N, rows of the STM.
        carriers: c; None: all K rows of the fact's chunk, as where a chunk tells one fact.
    """
    carriers = new_rows if carriers is None else carriers
    if carriers < 1:
        raise InputError(f"carriers must be at least 1, got {carriers}")
    return float(1 - (1 - one_row(age, new_rows, short_term)) ** carriers)


def with_chance(known: float, chance: float, ceiling: float = 1.0) -> float:
    """Return the accuracy where a fact is known with probability ``known``: then ``ceiling``, else ``chance``."""
    return chance + known * (ceiling - chance)


def curves(
    ages: Iterable[int], new_rows: int, short_term: int, chance: float = 0.0, ceiling: float = 1.0
) -> tuple[Curve, ...]:
    """Return both laws over ``ages``: from ``ceiling``, the accuracy where the fact is known, down to ``chance``."""
    ages = list(ages)
    best = "" if ceiling == 1 else f", known facts answered at {ceiling:.3g}"
    guess = f" + chance {chance:.3g}{best}" if chance else best
    laws = (
        ("any of K", any_row, f"1-(1-(1-{new_rows}/{short_term})^n)^{new_rows}"),
        ("one row", one_row, f"(1-{new_rows}/{short_term})^n"),
    )
    return tuple(
        Curve(
            name=name,
            formula=formula + guess,
            accuracy_by_age={age: with_chance(law(age, new_rows, short_term), chance, ceiling) for age in ages},
        )
        for name, law, formula in laws
    )
