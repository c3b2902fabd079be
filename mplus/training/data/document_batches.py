"""DocumentBatches: documents, read on and on by persistent streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypedDict, cast

import torch
from attrs import define, field

from mplus.config import flag, is_whole, must_be, whole
from mplus.errors import CheckpointError, ConfigError, InputError
from mplus.training.batch import Batch, BatchSource, Saved, TextSample, Windows, collate
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.data.documents import DocumentList, DocumentOptions, Documents, open_documents
from mplus.training.data.iterator import BatchShape, DocumentIterator, IteratorState, Passage
from mplus.training.data.options import as_span, span, text
from mplus.training.data.sampler import Bucket, DocumentSampler, as_buckets
from mplus.training.data.tokens import TokenCache, Tokenizer, encode

_query_tokens = must_be(
    'a whole number of at least 1, "random" or None',
    lambda value: value is None or value == "random" or is_whole(value, 1),
)


@define(frozen=True, kw_only=True)
class DocumentBatchesOptions(DocumentOptions):
    """Options of ``DocumentOptions`` and these. Lengths are tokens; a pair is ``[least, most]``.

    Attributes:
        chunk_tokens: of a chunk; one length or a pair. All chunks of a batch are equally long.
        target_tokens: of the text that follows the chunks; one length or a pair.
        consecutive: go through every document batch by batch, so that the memory holds its past. False: every batch
            takes new documents, the target from the end of one and the chunks from just before it (published).
        shuffle: take documents in random order, another in every pass.
        streams: deal the documents out to so many streams, those of all processes; None: every stream goes through
            all documents in an order of its own. Needed for ``streaming``.
        shuffle_block: documents of a streamed set that are shuffled among each other.
        bins: length bins, tables of ``at_least``, ``below`` and ``share``.
        query_tokens: first tokens of a text that retrieval sees; they are not predicted. "random": of each text
            another number of them, and all are predicted (released code). None: it sees all, also what is to be
            predicted.
        window_tokens: of the plain text of ``Batch.windows``; 0: none.
        repeat_instruction: in front of a text that asks for the chunks themselves.
        repeat_cue: tokens after the instruction that are not predicted, as they say which text to repeat.
    """

    chunk_tokens: tuple[int, int] = field(default=(512, 512), converter=as_span, validator=span(1))
    target_tokens: tuple[int, int] = field(default=(16, 512), converter=as_span, validator=span(2))
    consecutive: bool = field(default=True, validator=flag)
    shuffle: bool = field(default=True, validator=flag)
    streams: int | None = field(default=None, validator=whole(1, optional=True))
    shuffle_block: int = field(default=1024, validator=whole(1))
    bins: tuple[Bucket, ...] = field(default=(), converter=as_buckets)
    query_tokens: int | Literal["random"] | None = field(default=None, validator=_query_tokens)
    window_tokens: int = field(default=0, validator=whole(0))
    repeat_instruction: str = field(default="Repeat:", validator=text)
    repeat_cue: int = field(default=5, validator=whole(1))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if isinstance(self.query_tokens, int) and self.query_tokens >= self.target_tokens[0]:
            raise ConfigError(
                f"query_tokens must be below the least of target_tokens ({self.target_tokens[0]}), got "
                f"{self.query_tokens}: there would be nothing to predict"
            )
        if self.streaming and self.streams is None:
            raise ConfigError("streams must be given with streaming, the number in all processes, got None")

    @property
    def shortest(self) -> int:
        """Documents of fewer tokens have no chunk and target even in a batch of the shortest ones."""
        return self.chunk_tokens[0] + self.target_tokens[0]


class _Position(TypedDict):
    batch: int
    documents: int | None
    streams: dict[int, IteratorState]


class DocumentBatches(BatchSource):
    """Chunks of documents and the text that follows them; see ``BatchSource``. Streams are never fresh.

    A chunk's source is its document: its number, plus the number of documents for every pass before. A batch has one
    text. Documents without room for a chunk and a target are skipped and counted.

    Args:
        options: what is read, and how.
        tokenizer: makes ids of text.
        numbers: global numbers of the streams.
        seed: of every order and length.
        documents: instead of those that ``options`` name.

    Raises:
        ConfigError: options that name no data, or a stream number of ``options.streams`` or more.
        InputError: there are no documents, or none is long enough.
        MissingDependencyError: a dataset, and ``datasets`` is not installed.
    """

    Options = DocumentBatchesOptions

    def __init__(
        self,
        options: DocumentBatchesOptions,
        *,
        tokenizer: Tokenizer | None,
        numbers: Sequence[int],
        seed: int,
        documents: Documents | None = None,
    ) -> None:
        if options.streams is not None and max(numbers) >= options.streams:
            raise ConfigError(f"streams must be above every stream's number ({max(numbers)}), got {options.streams}")
        self.options = options
        self._seed = seed
        self._step = 0
        self._documents = open_documents(options) if documents is None else documents
        self._instruction = encode(tokenizer, options.repeat_instruction)
        cache = TokenCache(tokenizer)
        self._check_lengths(cache)
        order = DocumentSampler(
            self._documents,
            seed=seed,
            shuffle=options.shuffle,
            streams=options.streams,
            block=options.shuffle_block,
        )
        self._order = order
        self._walks = [
            DocumentIterator(number, order, cache, seed, options.shortest, options.bins) for number in numbers
        ]

    @property
    def skipped(self) -> dict[str, int]:
        """Return the documents that this source's streams passed over, counted by reason.

        Reason -> documents, and "unused_tokens" at ends of documents.

        A document counts in every stream and pass that meets it.
        """
        total: Counter[str] = Counter()
        for walk in self._walks:
            total.update(walk.skipped)
        return dict(total)

    def next_batch(self, chunks: int = 1, *, repeat: bool = False) -> Batch:
        options = self.options
        if repeat and not chunks:
            raise InputError("the repeat task needs at least 1 chunk, got chunks=0")
        draws = CounterRNG(self._seed, "lengths", self._step)  # the same for all streams, as their tensors are stacked
        size, longest = draws.between(*options.chunk_tokens), options.target_tokens[1]
        most = draws.between(*options.target_tokens) if options.consecutive else longest
        need = BatchShape(
            chunks=chunks, chunk_tokens=size, target_tokens=(options.target_tokens[0], most), first=repeat
        )
        passages = [walk.follow(need) if options.consecutive else walk.sample(need) for walk in self._walks]
        self._step += 1
        self._order.forget({walk.stream: walk.oldest for walk in self._walks})
        texts = [
            self._repeat(passage, longest) if repeat else self._continue(passage, walk.stream)
            for passage, walk in zip(passages, self._walks, strict=True)
        ]
        windows = None
        if options.window_tokens:
            windows = Windows(options.window_tokens, [p.past for p in passages], whole=not repeat)
        return collate(
            [p.chunks for p in passages], [p.sources for p in passages], [[text] for text in texts], size, windows
        )

    def state_dict(self) -> dict[str, Saved]:
        return {
            "batch": self._step,
            "documents": self._documents.count,
            "streams": cast("Saved", {walk.stream: walk.state() for walk in self._walks}),
        }

    def load_state_dict(self, state: dict[str, Saved]) -> None:
        """Go on from a saved position.

        Raises:
            CheckpointError: it was saved with another number of documents, or lacks a stream of this source.
        """
        position = cast("_Position", state)
        count, saved = self._documents.count, position["documents"]
        if isinstance(self._documents, DocumentList) and count != saved:
            raise CheckpointError(f"the data must be what it was when saved: {saved} documents then, {count} now")
        streams = {int(stream): place for stream, place in position["streams"].items()}
        missing = [walk.stream for walk in self._walks if walk.stream not in streams]
        if missing:
            raise CheckpointError(f"the saved data position must have every stream, it lacks {missing}")
        self._step = position["batch"]
        self._documents.count = saved if count is None else count
        for walk in self._walks:
            walk.restore(streams[walk.stream])

    def _check_lengths(self, cache: TokenCache) -> None:
        """Look for one document that has room for the longest chunk and a target."""
        needed = self.options.chunk_tokens[1] + self.options.target_tokens[0]
        longest = index = -1
        for index, document in enumerate(self._documents.iterate()):
            longest = max(longest, len(cache.ids(index, document)))
            if longest >= needed:
                return
        if index < 0:
            raise InputError("the data set is empty: give at least one document")
        raise InputError(
            f"a document must have {needed} tokens, for the longest chunk and the shortest target, and the longest of "
            f"{index + 1} has {longest}: give longer documents, or lower chunk_tokens or target_tokens"
        )

    def _continue(self, passage: Passage, stream: int) -> TextSample:
        """Return the target; its first token has nothing before it that would predict it."""
        seen = self.options.query_tokens
        if seen == "random":
            drawn = CounterRNG(self._seed, "queries", self._step, stream).between(1, len(passage.target) - 1)
            return TextSample(passage.target, source=passage.source, query_tokens=drawn)
        return TextSample(passage.target, source=passage.source, prompt_tokens=seen or 1, query_tokens=seen)

    def _repeat(self, passage: Passage, longest: int) -> TextSample:
        """Return the chunks of the last document in the passage, as far as a text may be long."""
        count = sum(1 for source in passage.sources if source == passage.source)
        ids = torch.cat([self._instruction, *passage.chunks[len(passage.chunks) - count :]])[:longest]
        given = len(self._instruction) + self.options.repeat_cue
        if len(ids) <= given:
            raise InputError(
                f"a text that asks for a repetition must have more than the {given} tokens of instruction and cue, "
                f"got {len(ids)}: raise chunk_tokens or target_tokens, or lower repeat_cue"
            )
        return TextSample(ids, source=passage.source, prompt_tokens=given, query_tokens=given)
