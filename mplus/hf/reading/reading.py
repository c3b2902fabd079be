"""Reading: the view of a memory that one forward or one generation works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from attrs import Factory, define, evolve, field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mplus.backends.base import Segment
from mplus.errors import MechanismError, MemoryMismatchError
from mplus.hf.adapters.weights import Look
from mplus.hf.types import Generated, Output
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import Attended, Decoder, Text
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.memory.memory import Memory
from mplus.memory.sources.clock import datetime_of
from mplus.memory.state import StreamView
from mplus.rows import NO_SOURCE

Front = tuple[Segment, ...] | Attended
"""What a layer sees in front of the text."""


@define(frozen=True, eq=False)
class Repeated:
    """``segments``: those ``of`` every stream, ``repeats`` times each."""

    of: Front
    repeats: int
    segments: Front


@define(eq=False)
class Reading:
    """A snapshot of a memory, which never changes, with what was retrieved and projected from it so far.

    Attributes:
        mechanism: decides what a layer sees.
        views: one stream per batch row of the memory.
        memory: the memory the views were taken from (None: several, or a test pass), and its ``version`` then.
        tokenizer: of the memory, or of all of several; None: there is none.
        memories, versions: several memories, one per batch row, and their versions then; (): there is one, or none.
        prepared: what reads of this state share, where rows are read as they are kept; else None.
        opened: what the mechanism made ready, with a view for each stream; where it ``reopens``, for each batch row.
        look: the weights it began with; None for a test pass.
        keep: remember projections for later tokens; off where gradients flow, because they must be recomputed.
        repeats_allowed: a batch may hold several copies of each row in turn (beams, several samples).
        prompt_tokens: retrieve with so many columns of the first forward only (the rest is guessed); None: with all.
        query_tokens: of these, retrieve with the first so many tokens; one number, or one per stream. None: as
            configured.
        prompt_mask: ``[prompts, T]`` bool of a generation, False at padding; None: there was no mask.
        queries: of each stream ``[q]`` int64, to retrieve with in the place of the text's tokens; None: with these.
        min_score: bring back only what scores higher; None: as configured.
        query_mask: ``[B, T]`` bool, False at what looks like padding in a text that came without a mask.
        retrieve_every: retrieve anew after so many further tokens.
        further_tokens: that a generation may read after the first forward.
        context_tokens: tokens of the first forward that do not count as further ones; as ``query_tokens``. None: all.
        retrieved: what each memory layer retrieved last.
        segments: what each memory layer sees in front of the text.
        repeated: the same for a batch that holds several copies of each row.
        recent: of each memory layer, the attention inputs ``[B, W, d]`` of the text since the last retrieval, where
            there is ``retrieve_every``.
        waiting: ``[B, W]`` bool on the CPU, True at those of these tokens that retrieve when enough have come.
        goes_on: the next forward is the first of a call that goes on with this text.
        starts: of what stands in the middle of the text, ``Placement.starts``; None: not yet known, or nothing does.
    """

    mechanism: MemoryMechanism
    views: Sequence[StreamView]
    memory: Memory | None = None
    version: int = -1
    prepared: Any = None
    look: Look | None = None
    keep: bool = True
    repeats_allowed: bool = False
    prompt_tokens: int | None = None
    query_tokens: int | tuple[int, ...] | None = None
    prompt_mask: Tensor | None = None
    queries: Sequence[Tensor] | None = None
    min_score: float | None = None
    query_mask: Tensor | None = None
    retrieve_every: int | None = None
    further_tokens: int = 0
    context_tokens: int | tuple[int, ...] | None = None
    retrieved: dict[int, list[Retrieved | None]] = field(factory=dict)
    segments: dict[int, Front] = field(factory=dict)
    repeated: dict[int, Repeated] = field(factory=dict)
    recent: dict[int, Tensor] = field(factory=dict)
    waiting: Tensor | None = None
    opened: Opened | None = None
    goes_on: bool = False
    starts: Tensor | None = None
    versions: Sequence[int] = ()
    memories: Sequence[Memory] = ()
    tokenizer: PreTrainedTokenizerBase | None = field(
        default=Factory(lambda self: getattr(self.memory, "tokenizer", None), takes_self=True)
    )

    def open(self, decoder: Decoder, text: Text, copies: int = 1) -> None:
        """Let the mechanism get ready, at the first forward, for so many copies of each stream."""
        views = [view for view in self.views for _ in range(copies)]
        self.opened = evolve(self.mechanism.open(decoder, views, text), prepared=self._as_kept())

    def asking(self, text: Text, copies: int = 1) -> Text:
        """Return a text with what the call says of retrieval, for so many copies of each stream."""
        return evolve(
            text,
            limited=(self.query_tokens or self.mechanism.config.query_tokens) is not None,
            queries=None if self.queries is None else [one for one in self.queries for _ in range(copies)],
            further=self.further_tokens,
            prompt=self.prompt_tokens is not None,
            min_score=self.min_score,
            reopens=self.reopens,
        )

    def need_opened(self) -> Opened:
        """Return the state that ``open`` made; of a reading that was made by hand, an empty one."""
        if self.opened is None:
            self.opened = Opened(self.views, prepared=self._as_kept())
        return self.opened

    def _as_kept(self) -> Any:
        """Return ``prepared``, unless rows with hidden states are to be projected anew."""
        # Where gradients flow the reading adapter learns by what it makes of the rows.
        return self.prepared if self.keep or not self.views[0].store.layout.keeps_hidden else None

    @property
    def reopens(self) -> bool:
        """Return whether the mechanism chooses anew what the text reads as more of it comes."""
        mechanism = self.mechanism
        return self.retrieve_every is not None and mechanism.reopens and any(map(mechanism.has_prefix, self.views))

    def exchange(self, opened: Opened) -> None:
        """Read what ``opened`` says from here on, in the place of what was read.

        Raises:
            MechanismError: the text would have to move, whose keys in the cache cannot.
        """
        before, streams = self.need_opened(), len(self.views)
        copies, wanted = (len(one.views) // streams for one in (before, opened))
        if copies == wanted:
            for name, was, would in _places(before, opened):
                if was is not would and (was is None or would is None or not torch.equal(was, would)):
                    raise MechanismError(
                        f"the mechanism {self.mechanism.name!r} must leave {name} as it is in reopen, since text that "
                        f"was read cannot move, got {would} after {was}"
                    )
        elif self.starts is not None:
            self.starts = self.starts[::copies].repeat_interleave(wanted, 0)  # copies of a stream begin alike
        self._set(opened)

    def extend(self, opened: Opened, read: Tensor) -> None:
        """Read besides what was read the further blocks that ``opened`` has, behind the ``read`` ``[B]`` tokens so far.

        Raises:
            MechanismError: text that was read would have to move.
        """
        before = self.need_opened().insertion
        blocks = 0 if before is None else before.tokens.shape[1]
        if before is not None and opened.insertion is not None:
            read_before = before.tokens <= read[:, None]  # others stood in text that was cut off
            for name in ("tokens", "rooms"):
                was, would = getattr(before, name), getattr(opened.insertion, name)[:, :blocks]
                if was.shape != would.shape or not torch.equal(was[read_before], would[read_before]):
                    raise MechanismError(
                        f"the mechanism {self.mechanism.name!r} must leave Insertion.{name} of what was read as it is "
                        f"in resume, since text that was read cannot move, got {would.tolist()} after {was.tolist()}"
                    )
        if opened.insertion is not None and bool((opened.insertion.tokens[:, blocks:] < read[:, None]).any()):
            raise MechanismError(
                f"the mechanism {self.mechanism.name!r} must put what it adds in resume behind the text that was read, "
                f"{read.tolist()} tokens, got Insertion.tokens {opened.insertion.tokens.tolist()}"
            )
        self._set(opened)

    def _set(self, opened: Opened) -> None:
        self.opened = evolve(opened, prepared=self._as_kept())
        self.segments.clear()
        self.repeated.clear()

    def is_of(self, memory: Memory) -> bool:
        """Return whether ``memory`` is still in the state this reading was taken in."""
        return self.memory is memory and self.version == memory.version

    def __deepcopy__(self, memo: dict[int, Reading]) -> Reading:
        """Return a reading of the same memory: copying a key/value cache must not copy memory and model with it."""
        recent = dict(self.recent)
        return evolve(self, retrieved=dict(self.retrieved), segments=dict(self.segments), repeated={}, recent=recent)

    def repeats(self, rows: int) -> int:
        """Return the copies of each stream in a batch of ``rows``. Raises MemoryMismatchError when they do not fit."""
        streams = len(self.views)
        # What one row read fits every copy of it: the cache of a prompt, repeated for several questions to it.
        if rows == streams or (rows and rows % streams == 0 and (self.repeats_allowed or streams == 1)):
            return rows // streams
        raise _other_batch(rows, streams)


def _places(before: Opened, now: Opened) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Yield the tensors that place a text, each by its name, in ``before`` and ``now``."""
    yield "Opened.text_offset", before.text_offset, now.text_offset
    for name in ("tokens", "rooms"):
        was, would = (None if one is None else getattr(one, name) for one in (before.insertion, now.insertion))
        yield f"Insertion.{name}", was, would


def one_per_row(views: Sequence[StreamView], rows: int) -> Sequence[StreamView]:
    """Return a view for every row of a batch; a memory of one stream is read by all of them, and nothing is copied.

    Args:
        views: of a memory, one per stream.
        rows: texts in the batch, without beams and further samples of a prompt.

    Raises:
        MemoryMismatchError: the memory has several streams, and the batch has another number of rows.
    """
    if rows and len(views) == 1:
        return [views[0]] * rows
    if len(views) != rows:
        raise _other_batch(rows, len(views))
    return views


def _other_batch(rows: int, streams: int) -> MemoryMismatchError:
    return MemoryMismatchError(
        f"the batch has {rows} rows and the memory {streams}: pass one row per stream, or choose streams for the rows "
        "with memory.select (a memory of one stream is read by every row)"
    )


@define(frozen=True)
class RetrievedSource:
    """One retrieved row, or a chunk of them that was retrieved as a whole.

    Attributes:
        layer: index among the layers that carry memory.
        source: name given to ``Memory.write``, or None.
        age: rows written since, per layer (0: the newest); of a chunk, since its first row.
        score: the retriever's score, or None where nothing was scored.
        written: when the source was last written, in UTC; None: it is not known.
        tokens: rows that it is; of a mechanism whose rows are tokens, the length of the chunk.
    """

    layer: int
    source: str | None
    age: int
    score: float | None
    written: datetime | None = field(default=None, repr=False)
    tokens: int = 1


class _Reported(Protocol):
    memory_sources: list[list[list[RetrievedSource]]]


def report_sources(output: Output | Generated, sources: list[list[list[RetrievedSource]]]) -> None:
    """Put ``memory_sources`` on what a call returns: an output with fields, since others were refused before it ran."""
    cast("_Reported", output).memory_sources = sources


def retrieved_sources(reading: Reading) -> list[list[list[RetrievedSource]]]:
    """Return, for every batch row of the memory and every memory layer, what was retrieved last, in its order."""
    opened = reading.opened if reading.mechanism.retrieves_in_open else None
    by_layer = {
        layer: own if opened is None else reading.mechanism.retrieved(opened, layer)
        for layer, own in sorted(reading.retrieved.items())
    }
    streams: list[list[list[RetrievedSource]]] = []
    for row, view in enumerate(reading.views if opened is None else opened.views):
        layers = []
        for layer, rows in by_layer.items():
            own = rows[row]
            layers.append([] if own is None else _described(layer, own, view))
        streams.append(layers)
    return streams


def _described(layer: int, retrieved: Retrieved, view: StreamView) -> list[RetrievedSource]:
    """Return the rows, or whole chunks, that one layer retrieved for one batch row."""
    rows, newest, known = retrieved.rows, view.state.clock - 1, view.state.sources
    lengths, firsts = [1] * len(retrieved.ids), list(range(len(retrieved.ids)))
    if retrieved.units is not None:
        lengths = retrieved.units.unique_consecutive(return_counts=True)[1].tolist()
        firsts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    # Lists, since a look at one number of a tensor takes longer than all the rest.
    births, numbers = rows.birth.tolist(), rows.source.tolist()
    scores = retrieved.scores.tolist() if len(retrieved.scores) else [None] * len(births)
    sources = {number: known[number] for number in dict.fromkeys(numbers) if number != NO_SOURCE}
    said = {number: (source.name, datetime_of(source.last_time)) for number, source in sources.items()}
    found = []
    for first, length in zip(firsts, lengths, strict=True):
        name, written = said.get(numbers[first], (None, None))
        found.append(RetrievedSource(layer, name, newest - births[first], scores[first], written, length))
    return found
