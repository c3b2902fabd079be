"""Converters and validators that the options of data sources share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from mplus.config import JsonValue, Validator, is_number, is_whole, must_be

text = must_be(
    "a text that is not empty, or None", lambda value: value is None or (isinstance(value, str) and value != "")
)
"""Validator: a text that is not empty, or None."""

texts = must_be(
    "a list of texts that are not empty",
    lambda value: isinstance(value, tuple) and all(isinstance(item, str) and item for item in value),
)
"""Validator: a tuple of texts."""

share = must_be("a number from 0 to 1", lambda value: is_number(value, 0, 1))
"""Validator: a number from 0 to 1."""


def as_texts(value: str | Iterable[str]) -> tuple[str, ...]:
    """Convert one text, or a list of them, to a tuple."""
    if isinstance(value, str):
        return (value,)
    # What is no list is left for the validator to refuse.
    return tuple(value) if isinstance(value, Iterable) else cast("tuple[str, ...]", value)


def as_span(value: int | Iterable[int]) -> tuple[int, int]:
    """Convert ``n`` to ``(n, n)``, and a list of two to a tuple."""
    return cast("tuple[int, int]", tuple(value) if isinstance(value, list | tuple) else (value, value))


def span(minimum: int) -> Validator:
    """Return a validator: ``(least, most)``, whole numbers with ``minimum <= least <= most``."""

    def holds(value: JsonValue) -> bool:
        if not isinstance(value, tuple) or len(value) != 2:
            return False
        least, most = value
        return is_whole(least, minimum) and is_whole(most, minimum) and least <= most

    def shown(value: JsonValue) -> JsonValue:
        same = isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]
        return value[0] if isinstance(value, tuple) and same else value

    return must_be(f"a whole number of at least {minimum}, or two of them, the smaller first", holds, shown)
