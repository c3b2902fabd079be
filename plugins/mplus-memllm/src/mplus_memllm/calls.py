"""Calls of MemLLM in a text: ``({MEM_WRITE-->s>>r>>o;...})`` and ``({MEM_READ(s>>r>>;>>r>>o)-->results})``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Triple = tuple[str, str, str]
Query = tuple[str | None, str, str | None]
"""A triple whose subject or object is asked for, and is None."""

OPENS, ARROW, CLOSES = "({", "-->", "})"
WRITE, READ = "MEM_WRITE", "MEM_READ("
SENTENCE_STARTS, SENTENCE_ENDS = "({USER_ST})", "({USER_END})"
BETWEEN, ITEMS = ">>", ";"
READ_CALL = re.compile(r"\(\{MEM_READ\((?:(?!\(\{).)*?\)-->.*?\}\)", re.DOTALL)


def write_call(triples: Iterable[Sequence[str]]) -> str:
    """Return the call that writes triples.

    Example:
        >>> write_call([("Apple Inc.", "founder", "Steve Jobs"), ("Apple Inc.", "inception", "1976")])
        '({MEM_WRITE-->Apple Inc.>>founder>>Steve Jobs;Apple Inc.>>inception>>1976})'
    """
    return f"{OPENS}{WRITE}{ARROW}{ITEMS.join(BETWEEN.join(triple) for triple in triples)}{CLOSES}"


def write_prompt(before: str, sentence: str) -> str:
    """Return the prompt behind which a decoder writes what a sentence says, with what stands in front of it."""
    return f"{before}{SENTENCE_STARTS}{sentence}{SENTENCE_ENDS}"


def triples_in(generated: str) -> list[Triple]:
    """Return the triples in what was generated for a write.

    They stand behind the last arrow, up to the first closing mark, if there is one. Parts that have not three fields
    are left out; fields may be empty.
    """
    parts = generated.rsplit(ARROW, maxsplit=1)[-1].split(CLOSES, maxsplit=1)[0].split(ITEMS)
    found = (part.split(BETWEEN) for part in parts)
    return [(one[0], one[1], one[2]) for one in found if len(one) == 3]


def read_call(queries: Iterable[Query]) -> str:
    """Return the call that asks queries, up to the arrow behind which the results go."""
    return f"{OPENS}{READ}{ITEMS.join(BETWEEN.join(field or '' for field in query) for query in queries)}){ARROW}"


def queries_in(body: str, *, strict: bool) -> list[Query] | None:
    """Return the queries in the body of a read call; None: the whole call is dropped.

    A part that begins with ``>>`` asks for a subject. Any other part asks for an object, whatever it has as its third
    field, and drops the whole call where it has no third field.

    Args:
        body: what stands in the round brackets.
        strict: queries with a field that is empty are left out.
    """
    found: list[Query] = []
    for part in body.split(ITEMS):
        fields = part.split(BETWEEN)
        if part.startswith(BETWEEN):
            if len(fields) != 3:
                continue
            query: Query = (None, fields[1], fields[2])
        elif len(fields) < 3:
            return None
        else:
            query = (fields[0], fields[1], None)
        if not strict or all(field != "" for field in query):
            found.append(query)
    return found


def results_of(names: Iterable[str], most: int) -> str:
    """Return names as results of a read call, each once, ``most`` at most."""
    return ITEMS.join(list(dict.fromkeys(names))[:most])


def without_calls(text: str) -> str:
    """Return a text without the finished read calls in it, results included."""
    return READ_CALL.sub("", text)


def resumed(context: str, body: str, results: str) -> str:
    """Return the text in which decoding goes on behind an answered call."""
    return f"{context}{OPENS}{READ}{body}){ARROW}{results}{CLOSES}"
