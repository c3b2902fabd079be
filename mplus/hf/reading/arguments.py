"""The arguments that a wrapped decoder adds to ``forward`` and ``generate``, and their misspelt relatives."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from attrs import define, field, fields
from transformers import GenerationConfig

from mplus.config import flag, whole
from mplus.errors import ArgumentError, ConfigError, InputError

if TYPE_CHECKING:
    from attrs import Attribute

    from mplus import Memory

SIMILAR = 0.7
"""Least ``difflib`` ratio at which an unknown argument counts as one of ours, misspelt."""


def _counts(value: Any) -> Any:
    """Keep a whole number; make a tuple of a sequence or tensor of them."""
    if value is None or isinstance(value, int | str):
        return value
    try:
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        return operator.index(items) if not isinstance(items, list) else tuple(operator.index(item) for item in items)
    except TypeError:
        return value


def _positive_counts(instance: ReadArguments, attribute: Attribute[int], value: Any) -> None:
    if value is None:
        return
    for count in value if isinstance(value, tuple) else (value,):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(
                f"{attribute.name} must be a whole number of at least 1, a sequence of them (one per row), or None, "
                f"got {value!r}"
            )


@define(frozen=True, kw_only=True, eq=False)
class ReadArguments:
    """The memory that one call reads, and how.

    Attributes:
        memory: one stream per batch row, or one for all of them; None: the decoder alone.
        query_tokens: retrieve with the first so many tokens of each text, padding not counted; one number, or one
            per row. None: as the config says. Rows with fewer tokens retrieve with all they have.
        retrieve_every: retrieve anew after so many further tokens.
        output_sources: return the retrieved rows as ``memory_sources``.
        reuse_memory_cache: accept a cache made under an older state of the memory, and read that one.

    Raises:
        ConfigError: a value breaks its rule.
    """

    memory: Memory | None = None
    query_tokens: int | tuple[int, ...] | None = field(default=None, converter=_counts, validator=_positive_counts)
    retrieve_every: int | None = field(default=None, validator=whole(1, optional=True))
    output_sources: bool = field(default=False, validator=flag)
    reuse_memory_cache: bool = field(default=False, validator=flag)

    def query_tokens_of(self, rows: int) -> int | tuple[int, ...] | None:
        """``query_tokens`` for a batch of ``rows``. Raises InputError where they are not one per row."""
        counts = self.query_tokens
        if isinstance(counts, tuple) and len(counts) != rows:
            raise InputError(
                f"query_tokens must be one whole number or one per row, got {len(counts)} for a batch of {rows} rows"
            )
        return counts


DEFAULTS: Mapping[str, Any] = {attribute.name: attribute.default for attribute in fields(ReadArguments)}
"""The added arguments and their defaults."""


def check_spelling(names: Iterable[str], base: type) -> None:
    """Refuse keyword arguments that are probably ours, misspelt: many decoders swallow what they do not know.

    Args:
        names: of keyword arguments, or settings of a ``GenerationConfig``.
        base: class of the decoder before it was wrapped.

    Raises:
        ArgumentError: a name is close to one of ours, and neither the decoder nor transformers has an argument of
            that name.
    """
    for name in names:
        meant = None if name in DEFAULTS else _meant(name)
        if meant is not None and name not in _known(base):
            raise ArgumentError(f"unknown argument {name!r}: did you mean {meant!r}?")


@lru_cache(maxsize=1024)
def _meant(name: str) -> str | None:
    close = difflib.get_close_matches(name.lower(), DEFAULTS, n=1, cutoff=SIMILAR)
    return close[0] if close else None


@lru_cache(maxsize=64)
def _known(base: type) -> frozenset[str]:
    """Return the arguments of the decoder's own methods, and settings of generation."""
    methods = [getattr(base, name) for name in ("forward", "generate", "prepare_inputs_for_generation")]
    return frozenset(vars(GenerationConfig())).union(*(inspect.signature(method).parameters for method in methods))
