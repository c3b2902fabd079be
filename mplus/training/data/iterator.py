"""DocumentIterator: the way of one stream through its documents, and what it takes from them for a batch."""

from __future__ import annotations

from collections import Counter
from typing import TypedDict

from attrs import define, field
from torch import Tensor

from mplus.errors import InputError
from mplus.training.batch import NO_SOURCE
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.data.sampler import Bucket, DocumentSampler, choose
from mplus.training.data.splitter import SplitRules, split_document
from mplus.training.data.tokens import TokenCache

WAITING = 16
"""Documents of one length bin that a stream sets aside while it looks for one of another bin."""


@define(frozen=True, eq=False, kw_only=True)
class BatchShape:
    """The numbers of chunks and tokens that every stream takes for one batch.

    Attributes:
        chunks, chunk_tokens: C contexts of n tokens.
        target_tokens: of the target, ``(least, most)``.
        first: keep a document's first contexts rather than those next to the target.
    """

    chunks: int
    chunk_tokens: int
    target_tokens: tuple[int, int]
    first: bool = False


@define(frozen=True, eq=False, kw_only=True)
class Passage:
    """Chunks and target of one stream for one batch.

    Attributes:
        chunks: C tensors ``[n]``.
        sources: C numbers of the documents they are from.
        target: ``[t]``, follows the last chunk in its document.
        source: number of that document, or ``NO_SOURCE`` if nothing of it was written.
        past: what the stream has seen of that document before the target, at least its chunks.
    """

    chunks: list[Tensor]
    sources: list[int]
    target: Tensor
    source: int
    past: Tensor


class IteratorState(TypedDict):
    """The position of a stream as plain data; see the attributes of ``DocumentIterator``."""

    next: int
    drawn: int
    current: int | None
    offset: int
    entered: int
    written: bool
    begun: bool
    waiting: dict[int, list[int]]
    skipped: dict[str, int]


@define(eq=False)
class DocumentIterator:
    """The way of one stream through its documents.

    Attributes:
        stream: its global number.
        order, cache: the documents, shared with other streams.
        seed: of the bins and of the place at which the first document is entered.
        shortest: documents of fewer tokens are passed over.
        bins: length bins, none: all lengths as they come.
        next: place in the stream's order of the next document to look at.
        drawn: documents drawn from bins.
        current: place of the document the stream is in; None: in none.
        offset: tokens of it that are done.
        entered: where the stream entered it.
        written: whether any of it was written.
        begun: whether the stream has entered its first document.
        waiting: bin -> places of documents set aside.
        skipped: reason -> number of documents passed over, and "unused_tokens" at the ends of others.
    """

    stream: int
    order: DocumentSampler
    cache: TokenCache
    seed: int
    shortest: int
    bins: tuple[Bucket, ...] = ()
    next: int = 0
    drawn: int = 0
    current: int | None = None
    offset: int = 0
    entered: int = 0
    written: bool = False
    begun: bool = False
    waiting: dict[int, list[int]] = field(factory=dict)
    skipped: Counter[str] = field(factory=Counter)
    _current_document: tuple[int, tuple[int, Tensor]] | None = (
        None  # the current document, which the cache might let go
    )

    def follow(self, need: BatchShape) -> Passage:
        """Go on where the last batch ended: through a document, then into the next one.

        The target is not passed: the next batch writes it. Where a document ends before C chunks and a target are
        found, its whole chunks are taken, and the rest comes from the documents after it.
        """
        size, (least, most) = need.chunk_tokens, need.target_tokens
        chunks: list[Tensor] = []
        sources: list[int] = []
        entered = 0
        while True:
            wanted = need.chunks - len(chunks)
            if self.current is None:
                number, ids = self._enter()
                entered = self._check_progress(entered, need)
                if not self.begun:  # streams begin at places of their own, lest all are at beginnings at once
                    self.begun = True
                    room = len(ids) - wanted * size - least
                    self.offset = self.entered = CounterRNG(self.seed, "enter", self.stream).below(max(1, room + 1))
            else:
                number, ids = self._look(self.current)
            room = len(ids) - self.offset
            last = room >= wanted * size + least
            fitting = wanted if last else max(0, min(room // size, wanted - 1))
            for _ in range(fitting):
                chunks.append(ids[self.offset : self.offset + size])
                sources.append(number)
                self.offset += size
                self.written = True
            if last:
                break
            self.skipped["unused_tokens"] += len(ids) - self.offset
            self.current = None
            entered = 0 if fitting else entered
        passage = Passage(
            chunks=chunks,
            sources=sources,
            target=ids[self.offset : self.offset + most],
            source=number if self.written else NO_SOURCE,
            past=ids[self.entered : self.offset],
        )
        if not need.chunks:  # nothing will write what is read now, so go on behind it
            self.offset += len(passage.target)
        return passage

    def sample(self, need: BatchShape) -> Passage:
        """Take a new document: its end is the target, what precedes it the contexts (see ``split_document``).

        Where it has fewer than C contexts, those of the documents taken before it come first.
        """
        rules = SplitRules(chunk_tokens=need.chunk_tokens, target_tokens=need.target_tokens)
        chunks: list[Tensor] = []
        sources: list[int] = []
        entered = 0
        while True:
            number, ids = self._enter()
            entered = self._check_progress(entered, need)
            wanted = need.chunks - len(chunks)
            split = split_document(ids, rules, CounterRNG(self.seed, "split", self.stream, self.current))
            if split is None:
                self.skipped["too_short_for_turn"] += 1
                continue
            last = len(split.contexts) >= wanted
            count = wanted if last else min(len(split.contexts), wanted - 1)
            contexts = split.contexts[:count] if need.first else split.contexts[len(split.contexts) - count :]
            chunks += contexts
            sources += [number] * count
            if last:
                break
            entered = 0 if count else entered
        done = len(ids) - len(split.target)
        return Passage(
            chunks=chunks,
            sources=sources,
            target=split.target,
            source=number if count else NO_SOURCE,
            past=ids[done - sum(map(len, contexts)) : done],
        )

    def state(self) -> IteratorState:
        """Return the position as plain data."""
        return {
            "next": self.next,
            "drawn": self.drawn,
            "current": self.current,
            "offset": self.offset,
            "entered": self.entered,
            "written": self.written,
            "begun": self.begun,
            "waiting": {key: list(places) for key, places in self.waiting.items()},
            "skipped": dict(self.skipped),
        }

    def restore(self, state: IteratorState) -> None:
        """Go on from ``state``."""
        self.next, self.drawn, self.current = state["next"], state["drawn"], state["current"]
        self.offset, self.entered = state["offset"], state["entered"]
        self.written, self.begun = state["written"], state["begun"]
        self.waiting = {int(key): list(places) for key, places in state["waiting"].items()}
        self.skipped = Counter(state["skipped"])

    @property
    def oldest(self) -> int:
        """The first place in the stream's order that may still be looked at."""
        places = [place for waiting in self.waiting.values() for place in waiting]
        return min([self.next, *places, *([] if self.current is None else [self.current])])

    def _look(self, place: int) -> tuple[int, Tensor]:
        if self._current_document is None or self._current_document[0] != place:
            number, index, document = self.order.take(self.stream, place)
            self._current_document = place, (number, self.cache.ids(index, document))
        return self._current_document[1]

    def _enter(self) -> tuple[int, Tensor]:
        """Go to the beginning of the next document."""
        wanted = None
        if self.bins:
            wanted = choose(self.bins, CounterRNG(self.seed, "bin", self.stream, self.drawn))
            self.drawn += 1
        # A document set aside earlier comes before any new one.
        place = self.waiting[wanted].pop(0) if wanted is not None and self.waiting.get(wanted) else self._find(wanted)
        self.current, self.offset, self.entered, self.written = place, 0, 0, False
        return self._look(place)

    def _find(self, wanted: int | None) -> int:
        """Return the place of the next document that is long enough and in the bin wanted."""
        passed = 0
        while True:
            place, (_, ids) = self.next, self._look(self.next)
            self.next += 1
            length = len(ids)
            found = next((number for number, item in enumerate(self.bins) if item.holds(length)), None)
            if length < self.shortest:
                self.skipped["too_short" if length else "empty"] += 1
            elif self.bins and found is None:
                self.skipped["in_no_bin"] += 1
            elif found == wanted:
                return place
            elif found is not None and len(self.waiting.setdefault(found, [])) < WAITING:
                self.waiting[found].append(place)
            else:
                self.skipped["of_another_bin"] += 1
            passed += 1
            if self.order.count is not None and passed > self.order.count:
                which = "" if wanted is None else f" in the bin of {self.bins[wanted]}"
                raise InputError(
                    f"stream {self.stream} finds no document of at least {self.shortest} tokens{which} among "
                    f"{self.order.count}: give longer documents, or lower chunk_tokens, target_tokens or the bin"
                )

    def _check_progress(self, entered: int, need: BatchShape) -> int:
        """Count a document entered. Raises InputError when no document gives what is needed."""
        if self.order.count is not None and entered > self.order.count:
            raise InputError(
                f"stream {self.stream} finds no document with the {need.chunk_tokens + need.target_tokens[0]} tokens "
                "of a chunk and its target: give longer documents, or lower chunk_tokens or target_tokens"
            )
        return entered + 1
