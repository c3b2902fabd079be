"""Calls of RET-LLM in a text: ``[MEM_WRITE{a>>b>>c}]``, and ``[MEM_READ{a>>b>>}:`` with one or two of three fields."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attrs import define

Triple = tuple[str, str, str]
Query = tuple[str | None, str | None, str | None]

WRITE_OPENS, WRITE_CLOSES = "[MEM_WRITE{", "}]"
READ_OPENS, READ_CLOSES = "[MEM_READ{", "}:"
BETWEEN = ">>"
WRITE = re.compile(r"\[MEM_WRITE\{((?:(?!\[MEM_WRITE\{).)*?)\}\]", re.DOTALL)
READ = re.compile(r"\[MEM_READ\{((?:(?!\[MEM_READ\{).)*?)\}:(?!\{)", re.DOTALL)


def write_call(triple: Sequence[str]) -> str:
    """Return the call that writes a triple.

    Example:
        >>> write_call(("Cyrus Alfred", "customer", "Pfizer"))
        '[MEM_WRITE{Cyrus Alfred>>customer>>Pfizer}]'
    """
    return f"{WRITE_OPENS}{BETWEEN.join(triple)}{WRITE_CLOSES}"


def writes_in(text: str) -> list[Triple]:
    """Return the triples of all finished write calls in a text that have three fields, none of them empty.

    White space around a field is left out.
    """
    found = (tuple(part.strip() for part in call[1].split(BETWEEN)) for call in WRITE.finditer(text))
    return [(one[0], one[1], one[2]) for one in found if len(one) == 3 and all(one)]


@define(frozen=True)
class OpenRead:
    """A read call that waits for its response.

    Attributes:
        place: in the text, behind the colon.
        query: of the call; None: it is none, and the call is ignored.
    """

    place: int
    query: Query | None


def first_open_read(text: str) -> OpenRead | None:
    """Return the first read call in a text behind which no response stands; None: there is none."""
    found = READ.search(text)
    return None if found is None else OpenRead(found.end(), query_of(found[1]))


def query_of(body: str) -> Query | None:
    """Return what stands in a read call as a query; None unless it has three fields, one or two of them given."""
    fields = tuple(part.strip() or None for part in body.split(BETWEEN))
    if len(fields) != 3 or sum(field is not None for field in fields) not in (1, 2):
        return None
    return fields[0], fields[1], fields[2]


def response(triples: Sequence[Sequence[str]]) -> str:
    """Return what is put behind the colon of a read call."""
    return ";".join(f"{{{BETWEEN.join(triple)}}}" for triple in triples)
