"""SCMPlayer: behaviours of SCM in a JSON file, computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mplus.config import JsonValue
from mplus.interop import BehaviourPlayer, Unavailable
from mplus_scm.controller import verdict
from mplus_scm.forms import Sizes, as_released, by_paper, form_of_last
from mplus_scm.ranking import cosines, rank


class SCMPlayer(BehaviourPlayer):
    """Plays the cases of the system "scm". Turns are numbers, and strings as names of JSON fields.

    Example:
        >>> from mplus.interop import replay
        >>> [report] = replay("plugins/mplus-scm/tests/goldens")
        >>> report.passed()
        True
    """

    system = "scm"
    quantities = ()

    def compute(self, name: str, given: Mapping[str, JsonValue]) -> JsonValue:
        if name not in BEHAVIOURS:
            raise Unavailable("this behaviour is not known to mplus-scm")
        return BEHAVIOURS[name](given)


def _ranking(given: Any) -> JsonValue:
    relevance = cosines(torch.tensor(given["query"]), torch.tensor(given["vectors"][:-1]))
    ranked = rank(
        relevance, given["times"][:-1], given["now"], decay=given["decay"], recency=given["recency"], k=given["k"]
    )
    return [[one.turn, one.score] for one in ranked]


def _last(given: Any) -> JsonValue:
    sizes = Sizes(given["raw_tokens"], given["summary_tokens"])
    return list(form_of_last(sizes, given["most"], published=True))


def _paper(given: Any) -> JsonValue:
    raw = {int(turn): tokens for turn, tokens in given["raw"].items()}
    forms = by_paper(given["picked"], raw, lambda turn: bool(given["enough"][str(turn)]), given["total"], given["item"])
    return {str(turn): form for turn, form in forms.items()}


def _released(given: Any) -> JsonValue:
    sizes = {int(turn): Sizes(raw, given["summary"][turn]) for turn, raw in given["raw"].items()}
    last = form_of_last(sizes[given["last"]], given["most"], published=True)[1]
    found = as_released(
        given["picked"], sizes, last, lambda turn, form: bool(given["answers"][str(turn)][form == "summary"]),
        given["budget"],
    )  # fmt: skip
    return {"form": {str(turn): form for turn, form in found.forms.items()}, "tokens": found.tokens, "fits": found.fits}


BEHAVIOURS: Mapping[str, Callable[[Any], JsonValue]] = {
    "ranking of turns": _ranking,
    "form of the last turn": _last,
    "summary or raw, by the paper": _paper,
    "drop, summary or raw, as released": _released,
    "the controller's verdict": lambda given: verdict(given["answer"]),
}
