"""NotesMechanism: passages of what was written, the best of which are put in front of the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, cast

import torch
from attrs import Attribute, AttrsInstance, define, field
from torch import Tensor

from mplus.config import JsonValue, MPlusConfig, number, one_of, whole
from mplus.errors import ConfigError
from mplus.mechanisms.search import choose
from mplus.mechanisms.text.asking import Ask
from mplus.mechanisms.text.mechanism import Recalled, TextMechanism, TokenBudget
from mplus.mechanisms.text.state import Entry, EntryState
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamView
from mplus.memory.writing.update import Fields
from mplus.retrievers.chunks.bm25 import bm25
from mplus.retrievers.chunks.words import share
from mplus.tokenizer import Tokenizer

WORD = re.compile(r"\w+")
MOST_TABLES = 4
"""Streams whose words are kept from one prompt to the next."""


def _template(instance: AttrsInstance, attribute: Attribute[str], value: JsonValue) -> None:
    try:
        framed = value.format(text="{text}", source="{source}") if isinstance(value, str) else ""
    except (KeyError, IndexError, ValueError):
        framed = ""
    if "{text}" not in framed:
        raise ConfigError(f"template must be a text with {{text}}, and perhaps {{source}}, in it, got {value!r}")


@define(frozen=True, eq=False)
class WordTable:
    """The words of texts as numbers.

    Attributes:
        texts: whose words these are.
        counts: ``[n]`` int64, words of each text.
        words: ``[m]`` int64, of all texts, one behind the other.
    """

    texts: tuple[str, ...] = ()
    counts: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.int64))
    words: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.int64))

    def of(self, texts: tuple[str, ...]) -> WordTable:
        """Return the table of ``texts``; only the words of new ones are looked for, where it has the first ones."""
        if texts == self.texts:
            return self
        known = self if texts[: len(self.texts)] == self.texts else WordTable()
        new = [_words(text) for text in texts[len(known.texts) :]]
        counts = torch.tensor([len(words) for words in new], dtype=torch.int64)
        words = torch.tensor([word for words in new for word in words], dtype=torch.int64)
        return WordTable(texts, torch.cat([known.counts, counts]), torch.cat([known.words, words]))


def _words(text: str) -> list[int]:
    return [hash(word) for word in WORD.findall(text.casefold())]  # 64 bits, the same within a process


class NotesMechanism(TextMechanism):
    """Keeps the text as it is, in passages, and puts those in front of the prompt that share most words with it.

    A passage that shares no word with the prompt is not recalled. Nothing is trained, and no pass of the decoder is
    run.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism={"name": "notes", "passages": 2, "place": "turn"})
    """

    @define(frozen=True, kw_only=True)
    class Options(TextMechanism.Options):
        """Options of the memory of notes.

        Attributes:
            passages: recalled at most.
            budget_tokens: that they may have together, with what frames them.
            template: how each of them stands in the prompt: ``{text}`` is the passage, ``{source}`` its source.
            order: of the passages: as "written", or by "score", the best one next to the prompt.
            place: in front of the prompt ("start", behind BOS), or of what the user says last ("turn").
            k1, b: of BM25, by whose scores over words passages are chosen.
        """

        passages: int = field(default=4, validator=whole(1))
        budget_tokens: int = field(default=512, validator=whole(1))
        template: str = field(default="{text}\n", validator=_template)
        order: str = field(default="score", validator=one_of("written", "score"))
        place: str = field(default="start", validator=one_of("start", "turn"))
        k1: float = field(default=1.5, validator=number(0))
        b: float = field(default=0.75, validator=share)

    name = "notes"

    @property
    def place(self) -> Literal["start", "turn"]:
        return cast('Literal["start", "turn"]', self.options.place)

    def write(self, entries: Sequence[Entry], passage: str, before: str, ask: Ask) -> Sequence[Fields]:
        """Keep the passage, without the white space around it."""
        return [(passage.strip(),)]

    def __init__(self, config: MPlusConfig, options: TextMechanism.Options) -> None:
        super().__init__(config, options)
        self._tables: tuple[WordTable, ...] = ()

    def recall(self, entries: Sequence[Entry], prompt: str, ask: Ask, budget: TokenBudget) -> Recalled:
        """Return the passages with the best scores that fit, each in its frame."""
        scores = self._scores(entries, prompt)
        able = scores.nonzero().squeeze(1)
        best = able[scores[able].argsort(descending=True)[: 4 * self.options.passages]].sort().values
        framed = {place: self._framed(entries[place]) for place in best.tolist()}
        lengths = torch.tensor([budget.count(text) for text in framed.values()], dtype=torch.int64)
        most = min(self.options.budget_tokens, budget.tokens)
        chosen = best[choose(lengths, scores[best], most)[: self.options.passages]]
        while True:
            places = (chosen.sort().values if self.options.order == "written" else chosen.flip(0)).tolist()
            text = "".join(framed[place] for place in places)
            if budget.count(text) <= most:  # one behind the other they may have more tokens than each alone
                break
            chosen = chosen[:-1]
        return Recalled(text, tuple(entries[place] for place in places), tuple(scores[places].tolist()))

    def search(self, decoder: Ask, view: StreamView, text: str, k: int, tokenizer: Tokenizer | None) -> list[FoundText]:
        """Return the passages that share most words with ``text``, whatever their length."""
        state = cast("EntryState", view.state)
        entries = state.entries()
        if not entries:
            return []
        scores = self._scores(entries, text)
        able = scores.nonzero().squeeze(1).flip(0)  # the newer first among equals
        best = able[scores[able].argsort(descending=True, stable=True)][:k].tolist()
        numbers = state.rows.source.tolist()
        return [FoundText.of(state, numbers[at], float(scores[at]), entries[at].fields[0]) for at in best]

    def _framed(self, entry: Entry) -> str:
        text: str = self.options.template.format(text=entry.fields[0], source=entry.source or "")
        return text

    def _scores(self, entries: Sequence[Entry], prompt: str) -> Tensor:
        """Return ``[n]`` float64, what each entry has to do with the words of the prompt."""
        texts, tables = tuple(entry.fields[0] for entry in entries), self._tables
        begun = [table for table in tables if texts[: len(table.texts)] == table.texts]
        before = max(begun, key=lambda table: len(table.texts), default=WordTable())
        table = before.of(texts)
        # Exchanged as a whole: other threads go on with what they have.
        self._tables = (table, *(other for other in tables if other is not before))[:MOST_TABLES]
        asked = torch.tensor(_words(prompt), dtype=torch.int64)
        return bm25(table.counts, table.words, asked, self.options.k1, self.options.b)
