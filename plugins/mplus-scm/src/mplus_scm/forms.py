"""Decide in which form a turn stands in the prompt: raw, as its summary, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from attrs import define

Form = Literal["raw", "summary", "drop"]
LAST_TOKENS = 500
"""Tokens from which the last turn is shown as its summary."""
TOTAL_TOKENS = 2000
"""Tokens of activated turns from which summaries are looked at, by the paper."""
ITEM_TOKENS = 800
"""Tokens of a turn from which its summary may stand for it, by the paper."""
BUDGET_TOKENS = 2500
"""Tokens of all turns together, as released."""


@define(frozen=True)
class Sizes:
    """The tokens of one turn.

    Attributes:
        raw: of the turn itself.
        summary: of its summary.
    """

    raw: int
    summary: int


@define(frozen=True)
class Chosen:
    """Forms of the picked turns.

    Attributes:
        forms: by turn, in the order in which they were picked.
        tokens: of these forms and the last turn together.
        fits: whether that is within the budget.
    """

    forms: Mapping[int, Form]
    tokens: int
    fits: bool


def form_of_last(sizes: Sizes, most: int = LAST_TOKENS, *, published: bool = False) -> tuple[Form, int]:
    """Return the form of the last turn, and the tokens that are counted for it.

    It is raw where it has fewer than ``most`` tokens. The released code counts a turn of exactly ``most`` tokens as if
    it were raw, and shows its summary (``published``); else what is shown is counted.
    """
    if sizes.raw < most:
        return "raw", sizes.raw
    return "summary", sizes.raw if published and sizes.raw == most else sizes.summary


def by_paper(
    picked: Sequence[int],
    raw: Mapping[int, int],
    enough: Callable[[int], bool],
    total: int = TOTAL_TOKENS,
    item: int = ITEM_TOKENS,
) -> dict[int, Form]:
    """Return the form of each picked turn as the paper says.

    Args:
        picked: turns.
        raw: tokens of each.
        enough: tells whether the summary of a turn is enough; asked of long turns only.
        total: of all picked turns, from which on a turn of more than ``item`` tokens may be a summary.
        item: see ``total``.
    """
    if sum(raw[turn] for turn in picked) <= total:
        return dict.fromkeys(picked, "raw")
    return {turn: "summary" if raw[turn] > item and enough(turn) else "raw" for turn in picked}


def as_released(
    picked: Sequence[int],
    sizes: Mapping[int, Sizes],
    last: int,
    answers: Callable[[int, Form], bool],
    budget: int = BUDGET_TOKENS,
) -> Chosen:
    """Return the form of each picked turn as the released code has it, which ends here in any case.

    Where everything raw is more than ``budget``, each turn but the best is judged: it is dropped where its raw text has
    no answer, and a summary where that has one. Then further turns become summaries, the worst match first, until all
    of it fits. The released loop goes on for ever where it never does; here ``fits`` is False then.

    Args:
        picked: turns, the worst match first.
        sizes: of each of them.
        last: tokens that are counted for the last turn.
        answers: tells whether a turn, in this form, answers the question.
        budget: tokens of all together.
    """
    forms: dict[int, Form] = dict.fromkeys(picked, "raw")
    if _tokens(forms, sizes) + last > budget:
        for turn in picked[:-1]:
            if not answers(turn, "raw"):
                forms[turn] = "drop"
            elif answers(turn, "summary"):
                forms[turn] = "summary"
        for turn in picked:
            if _tokens(forms, sizes) + last <= budget:
                break
            if forms[turn] == "raw":
                forms[turn] = "summary"
    tokens = _tokens(forms, sizes) + last
    return Chosen(forms, tokens, tokens <= budget)


def _tokens(forms: Mapping[int, Form], sizes: Mapping[int, Sizes]) -> int:
    return sum(0 if form == "drop" else getattr(sizes[turn], form) for turn, form in forms.items())
