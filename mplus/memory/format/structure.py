"""Plain data, as JSON gives it, to attrs classes: strictly, and with every fault named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast, get_args

import attrs
import cattrs
from cattrs.errors import AttributeValidationNote, ClassValidationError, ForbiddenExtraKeysError

from mplus.config import JsonValue, Validator

M = TypeVar("M")
V = TypeVar("V")
A = TypeVar("A", bound=attrs.AttrsInstance)
LARGEST = 2**62
"""Largest whole number that is read: one that can be added to within 64 bits."""


def structured(plain: JsonValue, cls: type[M], path: str) -> M:
    """Make an instance of the attrs class ``cls`` from plain data.

    Numbers, texts and flags are taken as they are and never converted, and there may be no fields but those of the
    class.

    Args:
        plain: a dict.
        cls: with annotations of plain types, attrs classes, tuples and dicts.
        path: what the whole is called in messages.

    Raises:
        ValueError: it does not fit; names every fault with its field, rule and value.
    """
    try:
        return converter(cls).structure(plain, cls)
    except (cattrs.BaseValidationError, ForbiddenExtraKeysError, TypeError, ValueError) as error:
        raise ValueError("; ".join(cattrs.transform_error(error, path, _described))) from error


def unstructured(instance: attrs.AttrsInstance) -> dict[str, Any]:
    """Return plain data that ``structured`` reads back.

    Without fields of the class that are marked by ``NOT_IN_FILES``.
    """
    plain: dict[str, JsonValue] = converter(type(instance)).unstructure(instance)
    return {name: value for name, value in plain.items() if name in _in_files(type(instance))}


NOT_IN_FILES = {"file": False}
"""``metadata`` of a field that is no part of the plain data."""
ONLY_IF_SET = {"only_if_set": True}
"""``metadata`` of a field that is left out of the plain data while it has its default."""


def _in_files(cls: type[attrs.AttrsInstance]) -> dict[str, attrs.Attribute[Any]]:
    return {field.name: field for field in attrs.fields(cls) if field.metadata.get("file", True)}


def converter(cls: type) -> cattrs.BaseConverter:
    """Return the converter that reads and writes instances of ``cls``."""
    # Not cattrs.Converter: an interrupt while that one generates code leaves the class unusable in this thread.
    # Annotations are texts (PEP 563), which cattrs does not read.
    _resolve(cls)
    made = cattrs.BaseConverter(detailed_validation=True)
    made.register_unstructure_hook(tuple, list)
    made.register_unstructure_hook_func(attrs.has, lambda instance: _plain(made, instance))
    made.register_structure_hook_func(attrs.has, lambda plain, cls: _instance(made, plain, cls))
    for kind, what in ((int, "a whole number"), (str, "a text"), (bool, "true or false")):
        made.register_structure_hook(kind, _exactly(kind, what))
    return made


def _resolve(annotation: type | None) -> None:
    """Turn the written annotations of attrs classes into types, wherever they stand in ``annotation``."""
    if isinstance(annotation, type) and attrs.has(annotation):
        attrs.resolve_types(annotation)
        for part in attrs.fields(annotation):
            _resolve(part.type)
    for part in get_args(annotation):
        _resolve(part)


def _exactly(kind: type, what: str) -> Callable[[JsonValue, type], JsonValue]:
    def check(plain: JsonValue, _: type) -> JsonValue:
        if type(plain) is not kind or (isinstance(plain, int) and abs(plain) > LARGEST):
            raise ValueError(f"must be {what}, got {_short(plain)}")
        return plain

    return check


def _plain(made: cattrs.BaseConverter, instance: attrs.AttrsInstance) -> dict[str, JsonValue]:
    """Return the fields of an attrs instance as plain data, without those that need not be said."""
    values = ((field, getattr(instance, field.name)) for field in attrs.fields(type(instance)))
    return {
        field.name: made.unstructure(value, unstructure_as=field.type)
        for field, value in values
        if not field.metadata.get("only_if_set") or value != field.default
    }


def _instance(made: cattrs.BaseConverter, plain: JsonValue, cls: type[A]) -> A:
    """Make an instance as ``cattrs.Converter`` does with ``forbid_extra_keys`` and ``detailed_validation``."""
    if not isinstance(plain, Mapping):
        raise ValueError(f"must be a table of fields, got {_short(plain)}")  # noqa: TRY004 - as all faults of a file
    fields = _in_files(cls)
    values: dict[str, Any] = {}
    errors: list[Exception] = []
    for name, field in fields.items():
        try:
            if name in plain:
                values[name] = made.structure(plain[name], cast("Any", field.type))
            elif field.default is attrs.NOTHING:
                raise ValueError("is missing")  # noqa: TRY301 - gets its note below, as the others do
        except Exception as error:  # noqa: BLE001 - collected, and raised together
            error.add_note(AttributeValidationNote(f"in {cls.__qualname__}", name, field.type))
            errors.append(error)
    if extra := {str(name) for name in plain if name not in fields}:
        errors.append(ForbiddenExtraKeysError("", cls, extra))
    if errors:
        raise ClassValidationError(f"in {cls.__qualname__}", errors, cls)
    return cls(**values)


def _described(error: BaseException, kind: type | None) -> str:
    if isinstance(error, ForbiddenExtraKeysError):
        return f"there is no field {', '.join(map(repr, sorted(error.extra_fields)))}"
    if isinstance(error, TypeError | AttributeError):
        return f"must be {'a table' if 'items' in str(error) else 'a list'} ({error})"
    return str(error)


def _short(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------- rules


def validator(check: Callable[[str, V], None]) -> Validator:
    """Return the validator of a field that calls ``check(name of the field, value)``, which raises ValueError."""

    def validate(instance: attrs.AttrsInstance, attribute: attrs.Attribute[V], value: V) -> None:
        check(attribute.name, value)

    return validate


def whole(least: int = 0, most: int = LARGEST) -> Validator:
    """Return a validator: a whole number in a range; of a tuple, every one of them."""
    return validator(partial(check_whole, least=least, most=most))


def check_whole(field: str, value: int | tuple[int, ...], *, least: int = 0, most: int = LARGEST) -> None:
    """Raise ValueError unless ``value`` is a whole number in a range, or a tuple of such."""
    for one in value if isinstance(value, tuple) else (value,):
        if type(one) is not int or not least <= one <= most:
            raise ValueError(f"{field} must be a whole number from {least} to {most}, got {_short(value)}")


def named_like(pattern: str, example: str) -> Validator:
    """Return a validator: a text of which all matches ``pattern``; messages give the ``example``."""
    return validator(partial(check_name, pattern=pattern, example=example))


def check_name(field: str, value: str, pattern: str, example: str) -> None:
    """Raise ValueError unless ``value`` is a text of which all matches ``pattern``."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{field} must be like {example!r}, got {_short(value)}")
