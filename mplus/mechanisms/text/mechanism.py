"""TextMechanism: a memory made of text, which needs nothing of a decoder but its prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from attrs import define, evolve

from mplus.config import ADAPTERS, Component, MPlusConfig, shortest_chunk
from mplus.errors import ConfigError
from mplus.mechanisms.root import Absorbed, Columns, Mechanism
from mplus.mechanisms.text.asking import Ask
from mplus.mechanisms.text.state import Entry, EntryState
from mplus.memory.merging.incoming import Incoming
from mplus.memory.state import StreamState
from mplus.memory.writing.update import Fields, NewEntries, WriteContext
from mplus.stores.base import StoreLayout

UNUSED = {
    "memory_tokens_per_chunk": (None, 1),
    "short_term_tokens": (None,),
    "retrieved_tokens": (None,),
    "long_term_tokens": (150_000, None),
    "bytes_budget": (None,),
    "drop_per_layer": (True,),
    "memory_positions": ("auto",),
    "position_span": (None,),
    "rope_inv_freq_dtype": (None,),
    "memory_rows": ("auto",),
    "store": (Component("ram"),),
    "eviction": (Component("fifo"),),
    "retriever": (Component("linear"),),
    "min_score": (None,),
    "backend": ("auto",),
    "adapters": (ADAPTERS, None),
}
"""Fields of a config that mean nothing to a memory of text, and the values they have when they are left out."""
ROWS = StoreLayout(layers=1, hidden_size=0, keeps_hidden=False)
"""The layout of an entry's row, which has a birth and a source and nothing else."""


@define(frozen=True, eq=False)
class TokenBudget:
    """The most tokens that recalled text may have, and a way to count them.

    Attributes:
        tokens: at most; what the decoder's positions leave beside the prompt and what is to be generated.
        count: returns the tokens of a text.
    """

    tokens: int
    count: Callable[[str], int]


@define(frozen=True)
class Recalled:
    """Text that a memory gives to the decoder.

    Attributes:
        text: as the decoder sees it.
        entries: that it was made of, for reports.
        scores: of each of them; empty where nothing was scored.
    """

    text: str = ""
    entries: tuple[Entry, ...] = ()
    scores: tuple[float, ...] = ()


class TextMechanism(Mechanism):
    """The rules of one memory of text. Holds no state of any memory; built as ``Mechanism(config, options)``.

    A write makes entries, tuples of texts. A read puts text in front of the prompt (``recall``), or answers calls that
    the decoder makes while it generates (``opens``, ``closes`` and ``answer``). It touches no layer of the decoder, so
    that it works with every one that generates, and its memories fit every decoder. A memory without entries leaves the
    decoder as it is, bit for bit.

    What is written from one source is made of that source's text alone, so that ``forget`` leaves nothing of it.

    Example:
        >>> class Diary(TextMechanism):
        ...     name = "diary"
        ...
        ...     def write(self, entries, passage, before, ask):
        ...         return [(passage,)]
        ...
        ...     def recall(self, entries, prompt, ask, budget):
        ...         return Recalled(entries[-1].fields[0], entries[-1:])

    Attributes:
        variants: of a configuration that it knows.
        opens: text that begins a call in what the decoder generates; None: it makes no calls. ``__init__`` may set
            it to None where options ask for none: with calls, text is generated in pieces.
        closes: text that ends it.
        most_calls: calls in one generated text; with further ones the text ends.
        call_tokens: tokens of a call, ``closes`` included; a longer one is taken back.
        keeps_calls: whether an earlier call and its answer stay in what the decoder sees when it makes another one.
        repeats_calls: whether a call that equals the one answered last is answered; else it is taken back.
    """

    variants: ClassVar[Sequence[str]] = ("paper",)
    State: ClassVar[type[StreamState]] = EntryState
    sizes: ClassVar[Mapping[str, int]] = {"chunk_tokens": 128}
    opens: str | None = None
    closes: ClassVar[str] = ""
    most_calls: ClassVar[int] = 8
    call_tokens: ClassVar[int] = 64
    keeps_calls: ClassVar[bool] = True
    repeats_calls: ClassVar[bool] = True

    def __init__(self, config: MPlusConfig, options: Any) -> None:
        self.config = config
        self.options = options

    @classmethod
    def settle(cls, config: MPlusConfig, room: int | None) -> MPlusConfig:
        """Return ``config`` with the size of passages; refuse what is about rows."""
        for name, left_out in {"variant": cls.variants, **UNUSED}.items():
            if getattr(config, name) not in left_out:
                value = getattr(config, name)
                plain = value.plain() if isinstance(value, Component) else value
                raise ConfigError(
                    f"{name} means nothing to the mechanism {cls.name!r}, whose memories are made of text and not of "
                    f"rows, got {plain!r}: leave it out"
                )
        chunk = config.chunk_tokens
        if chunk is None:
            chunk = cls.sizes["chunk_tokens"] if room is None else max(min(cls.sizes["chunk_tokens"], room // 2), 1)
        if config.min_chunk_tokens not in (None, shortest_chunk(chunk)):
            raise ConfigError(
                f"min_chunk_tokens means nothing to the mechanism {cls.name!r}, which takes texts of any length, got "
                f"{config.min_chunk_tokens}: leave it out"
            )
        return evolve(
            config,
            chunk_tokens=chunk,
            min_chunk_tokens=shortest_chunk(chunk),
            memory_tokens_per_chunk=1,
            long_term_tokens=None,
            adapters=None,
        )

    @property
    def place(self) -> Literal["start", "turn"]:
        """Where recalled text stands: at the start of the prompt, behind BOS, or at the opening of the last user turn.

        A prompt that has no turns of the tokenizer's chat template gets it at the start.
        """
        return "start"

    @abstractmethod
    def write(self, entries: Sequence[Entry], passage: str, before: str, ask: Ask) -> Sequence[Fields]:
        """Return the fields of the entries that a passage leaves; none where there is nothing to keep.

        Args:
            entries: those of the passage's source so far, oldest first.
            passage: whole sentences, ``chunk_tokens`` tokens at most.
            before: the passage in front of it in the same write; "" for the first one.
            ask: the decoder.
        """

    def recall(self, entries: Sequence[Entry], prompt: str, ask: Ask, budget: TokenBudget) -> Recalled:
        """Return text to put in front of a prompt; by default none.

        Args:
            entries: all of the stream, oldest first; at least one.
            prompt: the text of the prompt, special tokens left out.
            ask: the decoder.
            budget: how long the text may be.
        """
        return Recalled()

    def calls(self, entries: Sequence[Entry]) -> Sequence[str]:
        """Return all that may stand in a call, one of which the decoder is held to; by default it may be anything.

        Args:
            entries: all of the stream, oldest first; at least one.
        """
        return ()

    def answer(self, entries: Sequence[Entry], call: str, ask: Ask) -> Recalled | None:
        """Return the text that goes behind a finished call; None: the call is taken back.

        Args:
            entries: all of the stream, oldest first; at least one.
            call: what was generated between ``opens`` and ``closes``.
            ask: the decoder.
        """
        return None

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> StreamState:
        return EntryState.empty()

    def absorb(self, state: StreamState, update: NewEntries, source: int, context: WriteContext) -> Absorbed:
        """Put the new entries of one stream behind those it has."""
        (new,) = update.entries
        return Absorbed(cast("EntryState", state).with_entries(new, source), 0, 0)

    def combine(self, state: EntryState, other: Incoming, context: WriteContext) -> Absorbed:
        """Put the entries of both streams into one order."""
        return Absorbed(state.merged(other), 0, 0)
