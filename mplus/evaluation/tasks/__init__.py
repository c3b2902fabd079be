"""Tasks: what is told and asked, of public data sets and of the little language of facts."""

from __future__ import annotations

from mplus.errors import UnknownNameError
from mplus.evaluation.tasks.babi import Babi
from mplus.evaluation.tasks.base import Protocol
from mplus.evaluation.tasks.conversations import Conversations
from mplus.evaluation.tasks.key_value import KeyValue
from mplus.evaluation.tasks.needles import Needles
from mplus.evaluation.tasks.notes import Notes
from mplus.evaluation.tasks.question_answering import NaturalQuestions, Squad

__all__ = ["PROTOCOLS", "protocol"]

PROTOCOLS: dict[str, type[Protocol]] = {
    cls.name: cls for cls in (Squad, NaturalQuestions, KeyValue, Babi, Notes, Needles, Conversations)
}


def protocol(name: str) -> type[Protocol]:
    """Return the protocol called ``name``. Raises UnknownNameError, which lists those there are."""
    if name not in PROTOCOLS:
        raise UnknownNameError(f"a protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]
