"""Length bins: how often documents of which length are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from attrs import define, field

from mplus.config import number, structure, whole
from mplus.errors import ConfigError
from mplus.training.data.counter_rng import CounterRNG


@define(frozen=True, kw_only=True)
class Bucket:
    """Documents of ``at_least`` and ``below`` so many tokens (None: no limit), and their ``share`` of all draws.

    Shares are relative: they need not add up to 1.
    """

    at_least: int = field(default=0, validator=whole(0))
    below: int | None = field(default=None, validator=whole(1, optional=True))
    share: float = field(default=1.0, validator=number(1e-9))

    def holds(self, tokens: int) -> bool:
        """Return whether a document of ``tokens`` tokens belongs here."""
        return tokens >= self.at_least and (self.below is None or tokens < self.below)

    def __str__(self) -> str:
        return (
            f"{self.at_least} tokens and more" if self.below is None else f"{self.at_least} to {self.below - 1} tokens"
        )


def as_buckets(value: Any) -> Any:
    """Converter: a list of tables to a tuple of bins, by length.

    Raises:
        ConfigError: a bin breaks a rule, is empty, or two of them overlap.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"bins must be a list of tables with at_least, below and share, got {value!r}")
    bins = [structure(Bucket, item) if isinstance(item, Mapping) else item for item in value]
    if not all(isinstance(item, Bucket) for item in bins):
        raise ConfigError(f"bins must be a list of tables with at_least, below and share, got {value!r}")
    bins.sort(key=lambda item: item.at_least)
    for item in bins:
        if item.below is not None and item.below <= item.at_least:
            raise ConfigError(f"below must be more than at_least ({item.at_least}) in a bin, got {item.below}")
    for shorter, longer in pairwise(bins):
        if shorter.below is None or shorter.below > longer.at_least:
            raise ConfigError(f"bins must not overlap, and that of {shorter} and that of {longer} do")
    return tuple(bins)


def choose(bins: Sequence[Bucket], draws: CounterRNG) -> int:
    """Draw a bucket by the shares, and return its index."""
    mark = draws.uniform() * sum(item.share for item in bins)
    for place, item in enumerate(bins):
        mark -= item.share
        if mark < 0:
            return place
    return len(bins) - 1


def bucket_of(bins: Sequence[Bucket], tokens: int) -> int | None:
    """Return the index of the bucket of a document of ``tokens`` tokens; None: it belongs to none."""
    return next((place for place, item in enumerate(bins) if item.holds(tokens)), None)
