"""Recall: what a memory of text puts in front of the prompts of one forward or generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from attrs import define, evolve, field
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mplus.errors import InputError, MechanismError, NotSupported
from mplus.hf.model.sizes import known_positions
from mplus.hf.reading.arguments import ReadArguments
from mplus.hf.reading.caches import first_tokens
from mplus.hf.reading.reading import RetrievedSource, one_per_row
from mplus.hf.text.encoding import encoded
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.places import Spliced, place_in
from mplus.mechanisms.text.mechanism import Recalled, TokenBudget
from mplus.mechanisms.text.state import Entry, EntryState
from mplus.memory.memory import Memory
from mplus.memory.sources.clock import datetime_of


@define(eq=False)
class TextReading:
    """A snapshot of a memory of text, with what was recalled of it for a batch of prompts.

    Attributes:
        memory: it was taken from.
        version: of the memory then.
        states: of the stream of each prompt.
        recalled: for each prompt, oldest first: what was put in front of it, then answers to calls.
        spliced: the prompts with it; None: nothing was recalled.
        columns: that forwards with one cache have read, padding and recalled text included.
    """

    memory: Memory
    version: int
    states: Sequence[EntryState]
    recalled: list[list[Recalled]] = field(factory=list)
    spliced: Spliced | None = None
    columns: int = 0

    def is_of(self, memory: Memory) -> bool:
        """Return whether ``memory`` is still in the state this reading was taken in."""
        return self.memory is memory and self.version == memory.version

    def __deepcopy__(self, memo: dict[int, TextReading]) -> TextReading:
        """Return a reading of the same memory: copying a cache must not copy memory and model with it."""
        return evolve(self, recalled=[list(found) for found in self.recalled])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the memory. Raises InputError: it has none."""
        found = self.memory.tokenizer
        if found is None:
            raise InputError(
                "a memory of text is read through a tokenizer: pass tokenizer= to new_memory, load or open"
            )
        return cast("PreTrainedTokenizerBase", found)

    def sources(self) -> list[list[list[RetrievedSource]]]:
        """Return, for every prompt, in a single layer, the entries that were recalled, in their order in the text."""
        found = []
        for state, parts in zip(self.states, self.recalled, strict=True):
            given = [
                (entry, part.scores[place] if part.scores else None)
                for part in parts
                for place, entry in enumerate(part.entries)
            ]
            found.append([[_described(state, entry, score) for entry, score in given]])
        return found


def _described(state: EntryState, entry: Entry, score: float | None) -> RetrievedSource:
    number = state.sources.find(entry.source)
    written = None if number is None else datetime_of(state.sources[number].last_time)
    return RetrievedSource(0, entry.source, state.clock - 1 - entry.birth, score, written)


def read(memory: Memory, rows: int) -> TextReading:
    """Return a reading of ``memory`` for a batch of ``rows`` prompts; one of one stream is read by all of them."""
    version, streams = memory.streams.versioned_snapshot()
    states = [cast("EntryState", view.state) for view in one_per_row(streams, rows)]
    return TextReading(memory, version, states, [[] for _ in states])


def recall(
    engine: TextEngine,
    reading: TextReading,
    ids: Tensor,
    mask: Tensor | None,
    arguments: ReadArguments,
    new: int = 0,
    *,
    together: bool = True,
) -> None:
    """Let the mechanism put text into prompts; ``reading`` has them then.

    Args:
        engine: of the decoder.
        reading: of the memory.
        ids: ``[B, T]`` int64.
        mask: ``[B, T]``, 0 at padding; None: there is none.
        arguments: of the call.
        new: tokens that are to be generated.
        together: the prompts are read in one batch.

    Raises:
        InputError: the memory has no tokenizer, or ``query_tokens`` or ``retrieval_query`` are not one per row.
        MechanismError: what was recalled is longer than it may be.
        NotSupported: prompts get texts of different lengths, and the decoder sees the padding between.
    """
    if not any(map(len, reading.states)):
        return
    text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    limit = arguments.query_tokens_of(len(ids))
    queries = arguments.queries_of(reading.tokenizer, len(ids))
    asked = first_tokens(text, engine.config.query_tokens if limit is None else limit)
    given, columns = [], []
    for row, state in enumerate(reading.states):
        places = text[row].nonzero().squeeze(1).tolist()
        prompt = ids[row][text[row]].tolist()
        place = place_in(reading.tokenizer, prompt, engine.mechanism.place) if prompt else 0
        own = asked[row].clone()
        if engine.mechanism.place == "turn" and place < len(places):
            own[: places[place]] = False  # earlier turns do not ask
        query = ids[row][own] if queries is None else queries[row]
        # Behind BOS recalled text is the beginning of the text, and gets the tokens of one.
        inside = place > 0 and prompt[place - 1] != reading.tokenizer.bos_token_id
        found = recalled(engine, reading.tokenizer, state, query, len(prompt) + new, inside=inside)
        reading.recalled[row].append(found)
        given.append(encoded(reading.tokenizer, found.text, inside=inside))
        columns.append(places[place] if place < len(places) else ids.shape[1])
    if any(given):
        if together and engine.sees_padding and len(set(map(len, given))) > 1:
            raise NotSupported(
                f"{type(engine.model).__name__} sees padding that a mask hides, and the prompts of this batch get "
                "texts of different lengths: read them one at a time"
            )
        padding = reading.tokenizer.pad_token_id or 0
        reading.spliced = Spliced.of(ids, mask, given, columns, padding)


def recalled_tokens(output: GenerateDecoderOnlyOutput, prompts: int) -> list[int] | list[None]:
    """Return how many tokens ``generate`` put into each of its prompts; None where the output has no cache to tell."""
    cache = output.past_key_values
    if cache is None:
        return [None] * prompts
    spliced: Spliced | None = getattr(getattr(cache, "_mplus_reading", None), "spliced", None)
    return [0] * prompts if spliced is None else spliced.inserted.tolist()


def recalled(
    engine: TextEngine,
    tokenizer: PreTrainedTokenizerBase,
    state: EntryState,
    query: Tensor,
    taken: int,
    *,
    inside: bool,
) -> Recalled:
    """Return the text that the mechanism recalls of one stream.

    Args:
        engine: of the decoder.
        tokenizer: of the memory.
        state: of the stream.
        query: ``[q]``, the tokens to recall by.
        taken: positions that prompt and generated text take.
        inside: it will stand behind other text.

    Raises:
        MechanismError: it is longer than it may be, or no ``Recalled``.
    """
    positions = known_positions(engine.model.config.get_text_config(decoder=True))
    most = 2**31 if positions is None else positions - taken
    if not len(state) or most < 1:
        return Recalled()
    budget = TokenBudget(most, lambda text: len(encoded(tokenizer, text, inside=inside)))
    prompt = str(tokenizer.decode(query, skip_special_tokens=True))
    found = engine.mechanism.recall(state.entries(), prompt, engine.asking(tokenizer), budget)
    check_recalled(engine, "recall", found)
    tokens = budget.count(found.text)
    if tokens > most:
        raise MechanismError(
            f"the mechanism {engine.mechanism.name!r}: recall must return at most {most} tokens, as the decoder's "
            f"positions leave, got {tokens}"
        )
    return found


def check_recalled(engine: TextEngine, method: str, found: Recalled) -> None:
    """Raise MechanismError unless ``found`` is what a mechanism may give to the decoder."""
    sound = isinstance(found, Recalled) and isinstance(found.text, str)
    if not sound or not all(isinstance(one, Entry) for one in found.entries):
        raise MechanismError(
            f"the mechanism {engine.mechanism.name!r}: {method} must return a Recalled with a text and the entries it "
            f"was made of, got {found!r:.80}"
        )
    if found.scores and len(found.scores) != len(found.entries):
        raise MechanismError(
            f"the mechanism {engine.mechanism.name!r}: {method} must return a score for each of its "
            f"{len(found.entries)} entries, or none, got {len(found.scores)}"
        )


def refuse_for_text(engine: TextEngine, arguments: ReadArguments) -> None:
    """Raise NotSupported for an argument that a memory of text cannot follow."""
    if arguments.min_score is not None:
        raise NotSupported(
            f"min_score does not go with the mechanism {engine.mechanism.name!r}, which has no threshold: leave it out"
        )
    if arguments.retrieve_every is not None:
        raise NotSupported(
            f"retrieve_every does not go with the mechanism {engine.mechanism.name!r}, which recalls once what a text "
            "reads: leave it out"
        )
