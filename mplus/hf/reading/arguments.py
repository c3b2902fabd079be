"""The arguments that a wrapped decoder adds to ``forward`` and ``generate``, and their misspelt relatives."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias, TypedDict, TypeGuard, cast

import torch
from attrs import define, field, fields
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mplus.config import any_number, flag, whole
from mplus.errors import ArgumentError, ConfigError, InputError

if TYPE_CHECKING:
    from attrs import Attribute

    from mplus import Memory

SIMILAR = 0.7
"""Least ``difflib`` ratio at which an unknown argument counts as one of ours, misspelt."""


Query = str | tuple[int, ...]
"""What to retrieve with: a text, or ids."""
Nested: TypeAlias = "int | str | Sequence[Nested] | None"
"""A number or a text, or several of them in sequences."""


def _counts(value: int | Sequence[int] | Tensor | None) -> int | tuple[int, ...] | None:
    """Keep a whole number; make a tuple of a sequence or tensor of them."""
    if value is None or isinstance(value, int | str):
        return value
    try:
        items = list(value) if not hasattr(value, "tolist") else value.tolist()
        return operator.index(items) if not isinstance(items, list) else tuple(operator.index(item) for item in items)
    except TypeError:
        return cast("None", value)  # it is none of these, so the validator refuses it by its value


def _queries(value: Nested | Tensor) -> Query | tuple[Query, ...] | None:
    """Make tuples of sequences and tensors of ids."""

    def as_tuples(items: Nested | Tensor) -> Nested:
        plain: Nested = items.tolist() if isinstance(items, Tensor) else getattr(items, "tolist", lambda: items)()
        return tuple(map(as_tuples, plain)) if isinstance(plain, list | tuple) else plain

    return cast("Query | tuple[Query, ...] | None", as_tuples(value))  # what is none of these the validator refuses


def _check_queries(
    instance: ReadArguments,
    attribute: Attribute[Query | tuple[Query, ...] | None],
    value: Query | tuple[Query, ...] | None,
) -> None:
    if value is None or _is_query(value):
        return
    if not isinstance(value, tuple) or not value or not all(map(_is_query, value)):
        raise ConfigError(
            f"{attribute.name} must be a text or token ids, or a sequence of these with one per row, none of them "
            f"empty, or None, got {value!r:.80}"
        )


def _is_query(value: Nested) -> TypeGuard[Query]:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, tuple) and bool(value) and all(type(one) is int and one >= 0 for one in value)


def _positive_counts(
    instance: ReadArguments, attribute: Attribute[int | tuple[int, ...] | None], value: int | tuple[int, ...] | None
) -> None:
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
        retrieval_query: retrieve with this in the place of the text's own tokens: a text or ids, for all rows or one
            per row. Not with mechanisms whose layers retrieve by themselves.
        min_score: bring back only what the retriever scores higher; None: as configured. With mechanisms that have such
            a threshold.
        retrieve_every: retrieve anew after so many further tokens.
        output_sources: return the retrieved rows as ``memory_sources``.
        reuse_memory_cache: accept a cache made under an older state of the memory, and read that one.

    Raises:
        ConfigError: a value breaks its rule.
    """

    memory: Memory | None = None
    query_tokens: int | tuple[int, ...] | None = field(default=None, converter=_counts, validator=_positive_counts)
    retrieval_query: Query | tuple[Query, ...] | None = field(
        default=None, converter=_queries, validator=_check_queries
    )
    min_score: float | None = field(default=None, validator=any_number)
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

    def queries_of(self, tokenizer: PreTrainedTokenizerBase | None, rows: int) -> list[Tensor] | None:
        """Return ``retrieval_query`` as ids ``[q]`` int64 for each of ``rows``; None where there is none.

        Raises:
            InputError: a text has no tokens or no tokenizer, or they are not one per row.
        """
        given = self.retrieval_query
        if given is None:
            return None
        queries = [given] * rows if _is_query(given) else list(given)
        if len(queries) != rows:
            raise InputError(
                f"retrieval_query must be one text or one per row, got {len(queries)} for a batch of {rows} rows"
            )
        tensors = []
        for query in queries:
            ids = query
            if isinstance(query, str):
                if tokenizer is None:
                    raise InputError(
                        "a retrieval_query of text needs a tokenizer: pass tokenizer= to new_memory, load or open, "
                        "or ids"
                    )
                ids = tokenizer(query, add_special_tokens=False)["input_ids"]
            if not ids:
                raise InputError(f"retrieval_query must have at least one token, got {query!r}")
            tensors.append(torch.tensor(ids, dtype=torch.int64))
        return tensors


DEFAULTS: Mapping[str, bool | None] = {attribute.name: attribute.default for attribute in fields(ReadArguments)}
"""The added arguments and their defaults."""


Given: TypeAlias = "Memory | str | float | Sequence[int] | Sequence[str | Sequence[int]] | None"
"""A value of one of the added arguments; None: nothing was said."""


class GivenArguments(TypedDict, total=False):
    """The arguments of a call that mplus adds, those that were given; see ``ReadArguments``."""

    memory: Memory | None
    query_tokens: int | Sequence[int] | None
    retrieval_query: str | Sequence[int] | Sequence[str | Sequence[int]] | None
    min_score: float | None
    retrieve_every: int | None
    output_sources: bool
    reuse_memory_cache: bool


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
        similar = None if name in DEFAULTS else _similar(name)
        if similar is not None and name not in _known(base):
            raise ArgumentError(f"unknown argument {name!r}: did you mean {similar!r}?")


@lru_cache(maxsize=1024)  # matching takes longer than a small layer, and the same names come for every token
def _similar(name: str) -> str | None:
    close = difflib.get_close_matches(name.lower(), DEFAULTS, n=1, cutoff=SIMILAR)
    return close[0] if close else None


@lru_cache(maxsize=64)
def _known(base: type) -> frozenset[str]:
    """Return the arguments of the decoder's own methods, and settings of generation."""
    methods = [getattr(base, name) for name in ("forward", "generate", "prepare_inputs_for_generation")]
    return frozenset(vars(GenerationConfig())).union(*(inspect.signature(method).parameters for method in methods))
