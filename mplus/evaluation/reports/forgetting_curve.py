"""Forgetting curves of a full short-term memory: every write replaces K of its N rows, drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

from attrs import define

from mplus.errors import InputError


class CurveFacts(TypedDict):
    """A curve as plain data."""

    name: str
    formula: str
    accuracy_by_age: Mapping[str, float]


@define(frozen=True, kw_only=True)
class Curve:
    """The predictions of a formula: ``accuracy_by_age`` of ``formula``.

    Example:
        >>> any_of_k, one_row = curves(ages=(0, 2), new_rows=4, short_term=16)
        >>> one_row.formula, one_row.accuracy_by_age
        ('(1-4/16)^n', {0: 1.0, 2: 0.5625})
    """

    name: str
    formula: str
    accuracy_by_age: dict[int, float]

    def plain(self) -> CurveFacts:
        """Return this as plain data."""
        by_age = {str(age): value for age, value in self.accuracy_by_age.items()}
        return {"name": self.name, "formula": self.formula, "accuracy_by_age": by_age}

    @classmethod
    def from_plain(cls, plain: CurveFacts) -> Curve:
        """Read ``plain`` back."""
        by_age = {int(age): value for age, value in plain["accuracy_by_age"].items()}
        return cls(name=plain["name"], formula=plain["formula"], accuracy_by_age=by_age)


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
            # A law gives the probability that a fact is known; where it is not, an answer is a guess.
            accuracy_by_age={age: chance + law(age, new_rows, short_term) * (ceiling - chance) for age in ages},
        )
        for name, law, formula in laws
    )
