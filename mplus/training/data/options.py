"""Converters and validators that the options of data sources share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from mplus.errors import ConfigError


def as_texts(value: Any) -> Any:
    """Converter: one text, or a list of them, to a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) else value


def texts(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Validator: a tuple of texts."""
    if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{attribute.name} must be a list of texts that are not empty, got {value!r}")


def text(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Validator: a text that is not empty, or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{attribute.name} must be a text that is not empty, or None, got {value!r}")


def share(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Validator: a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{attribute.name} must be a number from 0 to 1, got {value!r}")


def as_span(value: Any) -> Any:
    """Converter: ``n`` to ``(n, n)``, and a list of two to a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def span(minimum: int) -> Any:
    """Validator: ``(least, most)``, whole numbers with ``minimum <= least <= most``."""

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        whole = isinstance(value, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        if not (whole and len(value) == 2 and minimum <= value[0] <= value[1]):
            shown = value[0] if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1] else value
            raise ConfigError(
                f"{attribute.name} must be a whole number of at least {minimum}, or two of them, the smaller first, "
                f"got {shown!r}"
            )

    return check
