"""Attribute: something that can be true of an invented person, and the sentences about it."""

from __future__ import annotations

from attrs import define


@define(frozen=True, kw_only=True)
class Attribute:
    """Something that is true of a person.

    Attributes:
        values: it can have.
        told: sentences that tell it, with ``{name}``, ``{first}`` (the first name) and ``{value}``.
        changed: sentences that tell that it is another one now.
        said: sentences in which a person tells it of themselves, with ``{value}``.
        asked: questions, with ``{name}``.
    """

    values: tuple[str, ...]
    told: tuple[str, ...]
    changed: tuple[str, ...]
    said: tuple[str, ...]
    asked: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())
