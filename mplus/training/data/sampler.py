"""Which document each stream takes when, the same whatever process it is in; and of which length: buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from attrs import define, field

from mplus.config import JsonValue, number, structure, whole
from mplus.errors import ConfigError
from mplus.training.data.counter_rng import CounterRNG, permuted
from mplus.training.data.documents import Document, DocumentList, Documents


class DocumentSampler:
    """The endless order in which streams take documents.

    With ``streams`` the documents are dealt out: stream i takes those at places i, i + streams, i + 2 streams ... of
    one order, so that all streams together take each once per pass. Without, every stream goes through all of them in
    an order of its own. Streamed documents must be dealt out, and are shuffled within blocks.

    Args:
        documents: what is taken.
        seed: of the shuffling.
        shuffle: take them in a random order, another in every pass.
        streams: number of streams in all processes together, or None.
        block: documents of a streamed set that are shuffled among each other.
    """

    def __init__(self, documents: Documents, *, seed: int, shuffle: bool, streams: int | None, block: int) -> None:
        self.documents = documents
        self._seed, self._shuffle, self._streams = seed, shuffle, streams
        self._blocks = None if isinstance(documents, DocumentList) else _Blocks(documents, block)
        if self._blocks is not None and streams is None:
            raise ConfigError("streams must be given for a streamed dataset, the number in all processes, got None")

    @property
    def count(self) -> int | None:
        """Number of documents, as far as it is known."""
        return self.documents.count

    def take(self, stream: int, place: int) -> tuple[int, int, Document]:
        """Return document ``place`` of a stream, counted from 0 without end.

        Returns:
            a number that differs from one pass to the next, the document's number in its set, the document.
        """
        if isinstance(self.documents, DocumentList):
            count = self.documents.count
            if self._streams is None:
                epoch, rest = divmod(place, count)
                order = f"own {stream}"
            else:
                epoch, rest = divmod(stream + place * self._streams, count)
                order = "dealt"
            index = permuted(rest, count, self._seed, order, epoch) if self._shuffle else rest
            return epoch * count + index, index, self.documents[index]
        return self._streamed(stream + place * (self._streams or 1))

    def forget(self, stream_places: dict[int, int]) -> None:
        """Let go of streamed documents before these places (stream -> the first place it may still ask for)."""
        if self._blocks is not None:
            self._blocks.forget(min(stream + place * (self._streams or 1) for stream, place in stream_places.items()))

    def _streamed(self, place: int) -> tuple[int, int, Document]:
        blocks = self._blocks
        if blocks is None:
            raise ConfigError("documents must be a list or a stream")
        while True:
            count = self.documents.count
            epoch, rest = (0, place) if count is None else divmod(place, count)
            block, inside = divmod(rest, blocks.size)
            found = blocks.get(epoch, block)
            if inside < len(found):
                if self._shuffle:
                    inside = permuted(inside, len(found), self._seed, "block", epoch, block)
                index = block * blocks.size + inside
                return epoch * (self.documents.count or 0) + index, index, found[inside]


class _Blocks:
    """Blocks of a stream of documents, read in order and kept until no stream needs them."""

    def __init__(self, documents: Documents, size: int) -> None:
        self.size = size
        self._documents = documents
        self._kept: dict[tuple[int, int], list[Document]] = {}
        self._reader: Iterator[Document] = iter(())
        self._next: tuple[int, int] | None = None
        self._jumped = False

    def get(self, epoch: int, block: int) -> list[Document]:
        """Block ``block`` of pass ``epoch``; shorter, or empty, at the end, where the number of documents is learnt."""
        if (epoch, block) not in self._kept:
            if self._next is None or self._next[0] != epoch or self._next[1] > block:
                self._reader, self._next = self._documents.iterate(block * self.size), (epoch, block)
                self._jumped = block > 0
            while self._next[1] <= block and self._read():
                pass
        return self._kept.get((epoch, block), [])

    def _read(self) -> bool:
        """Read the next block; False at the end."""
        if self._next is None:
            return False
        epoch, block = self._next
        found = [document for _, document in zip(range(self.size), self._reader, strict=False)]
        self._kept[epoch, block] = found
        self._next = epoch, block + 1
        if len(found) < self.size and self._documents.count is None:
            past_the_end = self._jumped and not found  # nothing was read before, so the place says nothing
            before = sum(1 for _ in self._documents.iterate()) if past_the_end else block * self.size
            self._documents.count = before + len(found)  # the set is known to end here
        self._jumped = False
        return len(found) == self.size

    def forget(self, place: int) -> None:
        count = self._documents.count
        epoch, rest = (0, place) if count is None else divmod(place, count)
        for key in [key for key in self._kept if key < (epoch, rest // self.size)]:
            del self._kept[key]


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


def as_buckets(value: Sequence[Bucket | Mapping[str, JsonValue]]) -> tuple[Bucket, ...]:
    """Convert a list of tables to a tuple of buckets, by length.

    Raises:
        ConfigError: a bin breaks a rule, is empty, or two of them overlap.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"bins must be a list of tables with at_least, below and share, got {value!r}")
    made = [structure(Bucket, item) if isinstance(item, Mapping) else item for item in value]
    bins = [item for item in made if isinstance(item, Bucket)]
    if len(bins) < len(made):
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
    return len(bins) - 1  # rounding can leave a little of the mark
