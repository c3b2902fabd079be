"""What the front asks of the engine and what it hears back: plain data, which travels between processes.

The front speaks HTTP and knows texts; the engine holds the decoder and the memories and knows token ids. A ``Generate``
is answered by a stream of events, every other command by one JSON object, in the shape that the HTTP contract gives it,
or by a ``ServingError``.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

from attrs import define, field

from mplus.config import JsonValue
from mplus.serving.errors import ServingError

GRACE = 1.0
"""Seconds for what runs when the engine is closed: by then the front has waited for all that somebody wants."""


@define(frozen=True)
class MemoryName:
    """A memory: the tenant whom it belongs to, and the id that the tenant calls it by."""

    tenant: str
    id: str


# ---------------------------------------------------------------------- memories


@define(frozen=True)
class MakeMemory:
    """Make an empty memory. Refused with 409 where it is there."""

    memory: MemoryName


@define(frozen=True)
class ListMemories:
    """List a tenant's memories in order of making: at most ``limit``, those behind the id ``after``."""

    tenant: str
    limit: int = 100
    after: str | None = None


@define(frozen=True)
class DescribeMemory:
    """Say how large a memory is, what its version is and when it was made."""

    memory: MemoryName


@define(frozen=True)
class DeleteMemory:
    """Delete a memory with its files; reads that have begun go on to their end."""

    memory: MemoryName


@define(frozen=True)
class ForkMemory:
    """Copy a memory to a new id of the same tenant."""

    memory: MemoryName
    to: str


@define(frozen=True)
class ExportMemory:
    """Write a snapshot of a memory to the file ``to``, as one stream."""

    memory: MemoryName
    to: str


@define(frozen=True)
class ImportMemory:
    """Take the content of an exported file into a memory that is made and empty (else 409)."""

    memory: MemoryName
    file: str


@define(frozen=True)
class ReleaseMemory:
    """Close a memory, if it is open here, once nothing uses it: another engine is about to open it."""

    memory: MemoryName


@define(frozen=True)
class DescribeUsage:
    """Say how many memories and bytes a tenant has, and its limits."""

    tenant: str


# ---------------------------------------------------------------------- what is written


@define(frozen=True)
class WriteMemory:
    """Write text, or chat messages, to a memory; reads that come after it see it.

    Attributes:
        data: the text, or messages with ``role`` and ``content``.
        source: its name.
        expires: seconds from now on, or an ISO 8601 time with a timezone; None: never.
        pin: keep it from eviction.
        write_id: writes once, whatever is repeated; None: every call writes.
    """

    memory: MemoryName
    data: str | Sequence[Mapping[str, str]]
    source: str | None = None
    expires: float | str | None = None
    pin: bool = False
    write_id: str | None = None


@define(frozen=True)
class FlushMemory:
    """Write what waits for a chunk to be full."""

    memory: MemoryName


@define(frozen=True)
class ListSources:
    """List what was written to a memory, in order of writing."""

    memory: MemoryName


@define(frozen=True)
class ForgetSource:
    """Forget all that was written under a name. Refused with 404 where there is none."""

    memory: MemoryName
    source: str


@define(frozen=True)
class ReadSource:
    """Return the words of a source, where the memory keeps them."""

    memory: MemoryName
    source: str


@define(frozen=True)
class SearchMemory:
    """Say what a question would bring back, with scores, without generating."""

    memory: MemoryName
    text: str
    k: int = 4


@define(frozen=True)
class EndRow:
    """End one row of an answer, whose text has come to a stop string; the others go on.

    Attributes:
        answer: id of the ``Generate``; nothing is done where it is over.
        row: number of the row.
    """

    answer: str
    row: int


Command: TypeAlias = (
    MakeMemory | ListMemories | DescribeMemory | DeleteMemory | ForkMemory | ExportMemory | ImportMemory
    | ReleaseMemory | DescribeUsage | WriteMemory | FlushMemory | ListSources | ForgetSource | ReadSource | SearchMemory
    | EndRow
)  # fmt: skip


# ---------------------------------------------------------------------- generating


@define(frozen=True)
class Sampling:
    """The way in which tokens are chosen.

    Attributes:
        max_tokens: at most so many; None: as many as there is room for.
        temperature: 0: the most probable token.
        top_p: from the smallest set of tokens of that probability.
        seed: of the draws, which are the same whoever else is answered; None: another one each time.
        logprobs: of so many best tokens at each place, besides that of the chosen one; None: none.
        ignore_end: go on behind the end token: for measurements.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    ignore_end: bool = False


@define(frozen=True)
class Generate:
    """Answer a prompt from a memory.

    Attributes:
        tenant: who asks.
        memory: what is read; None: the decoder alone answers.
        prompt: token ids.
        answers: rows that share the prompt.
        sampling: of every row; row ``i`` draws with ``seed + i``.
        min_score: bring back only what scores higher; 0: whatever there is; None: as the memory is configured.
        question: token ids to retrieve with in the place of the prompt's; None: as the mechanism finds them in it.
        id: by which ``EndRow`` names it.
    """

    tenant: str
    memory: MemoryName | None
    prompt: Sequence[int]
    answers: int = 1
    sampling: Sampling = field(factory=Sampling)
    min_score: float | None = None
    question: Sequence[int] | None = None
    id: str = field(factory=lambda: uuid.uuid4().hex, eq=False)


@define(frozen=True)
class Source:
    """Something that came back from memory for a prompt.

    Attributes:
        source: the name it was written under.
        rows: how many rows of it, in all layers.
        score: the best; None where nothing was scored.
        age: text tokens written since.
        written: when its source was last written, ISO 8601 in UTC; None: not known.
    """

    source: str | None
    rows: int
    score: float | None
    age: int
    written: str | None


@define(frozen=True)
class Began:
    """The prompt has been read, and the first token is about to come.

    Attributes:
        prompt_tokens: of the prompt.
        memory_version: of the memory that was read; None: none was.
        sources: what came back, best first.
    """

    prompt_tokens: int
    memory_version: int | None
    sources: Sequence[Source] = ()


@define(frozen=True)
class TokenLogprobs:
    """Log-probabilities at the place of one token: its own, and the best as pairs of id and value."""

    chosen: float
    best: Sequence[tuple[int, float]] = ()


@define(frozen=True)
class NewToken:
    """One more token of the answer ``row``."""

    row: int
    id: int
    logprobs: TokenLogprobs | None = None


@define(frozen=True)
class Ended:
    """The answer ``row`` is complete: the end token came, or the last one that there is room for."""

    row: int
    reason: Literal["stop", "length"]


Event: TypeAlias = Began | NewToken | Ended


@define(frozen=True)
class ModelFacts:
    """The facts of the decoder that the front has to know.

    Attributes:
        name: under which clients ask for it.
        folder: where its tokenizer is.
        context: positions for a prompt and its answer, beside what is read.
        vocabulary: ids are below it.
        mechanism: of the memories.
        created: Unix time at which it was loaded.
    """

    name: str
    folder: str
    context: int
    vocabulary: int
    mechanism: str
    created: int


@define(frozen=True)
class Delivery:
    """News of a request, from the engine.

    Attributes:
        number: of the request.
        events: of a ``Generate``, in order.
        answer: to a command.
        error: it has failed.
        over: nothing more comes.
    """

    number: int
    events: tuple[Event, ...] = ()
    answer: Mapping[str, JsonValue] = field(factory=dict)
    error: ServingError | None = None
    over: bool = False


class EngineClient(Protocol):
    """The engine as the front sees it: in a thread, in a process of its own, or on Ray."""

    async def model(self) -> ModelFacts:
        """Return the facts of the decoder. Raises ServingError (503) while there is none."""

    async def call(self, command: Command) -> Mapping[str, JsonValue]:
        """Return the answer to a command. Raises ServingError."""

    def generate(self, request: Generate) -> AsyncIterator[Sequence[Event]]:
        """Yield what happens to a request, the events of one step together; ``aclose`` cancels it, waiting or not.

        Ends once every row has ended. Raises ServingError, also in the middle where the engine fails.
        """

    async def metrics(self) -> Mapping[str, float]:
        """Return counts and sums, by name, for ``/metrics``."""

    async def close(self) -> None:
        """End what runs and close all memories."""
