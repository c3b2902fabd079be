"""MemLLMMechanism: a store of triples, read and written by calls of the decoder.

Modarressi et al., "MemLLM: Finetuning LLMs to Use An Explicit Read-Write Memory" (arXiv 2404.11672), sections 3 and 4,
and its released code. A write shows the decoder one sentence behind earlier ones and keeps the triples of the call
``({MEM_WRITE-->s>>r>>o;...})`` that it makes, stopped late. While a text is generated, ``({`` opens a call
``({MEM_READ(s>>r>>;>>r>>o)-->``; the names that its queries find are pasted with ``})`` behind them, and decoding goes
on. An earlier call is cut out of what the decoder sees when it makes the next one.

Faithful: calls and how they are read, the queries of the store with their limits and thresholds, exact matches first,
a call without results or equal to the last one taken back, late stopping. The decoder of the paper is fine-tuned (two
LoRAs): one that was not neither writes freely nor opens calls.

Ours: vectors of n-grams by default, in the place of Contriever ("encoder:facebook/contriever-msmarco" is that one); an
exact search in the place of HNSW; results in the order of their scores (the released order is random); a triple that
two sources said is kept for each of them, and once in what a query finds; marks are found in decoded text, since they
are tokens of some vocabularies only; calls held to what is stored, writes to a vocabulary, a call made for the prompt,
triples written by hand. A memory keeps texts alone, and goes from decoder to decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

from attrs import define, field

from mplus.config import JsonValue, MPlusConfig
from mplus.errors import InputError
from mplus.mechanisms import (
    Ask,
    Entry,
    Recalled,
    TextMechanism,
    TextVectors,
    TokenBudget,
    flag,
    must_be,
    number,
    one_of,
    vectors_name,
    whole,
)
from mplus_memllm.calls import ARROW, CLOSES, OPENS, READ, WRITE, Query, Triple, queries_in, results_of, write_call
from mplus_memllm.store import Match, Tables, Thresholds
from mplus_memllm.writing import sentences_of, written_freely, written_from_vocabulary

ASKING = (
    "Question: In which town does Otto Brandt live?\nCall: ({MEM_READ(Otto Brandt>>residence>>)-->\n"
    "Question: Who wrote Momo?\nCall: ({MEM_READ(Momo>>author>>)-->\n"
    "Question: Where was Ines Prado born?\nCall: ({MEM_READ(Ines Prado>>place of birth>>)-->\nQuestion: "
)
BEFORE = 25
"""Earlier sentences that a write shows."""

names = must_be(
    "a list of texts that are not empty, without '>>' and ';'",
    lambda value: (
        isinstance(value, (list, tuple))
        and all(isinstance(one, str) and one.strip() and ">>" not in one and ";" not in one for one in value)
    ),
)
"""Validator: names of relations."""


class MemLLMMechanism(TextMechanism):
    """A store of triples that the decoder writes, and asks while it generates.

    Example:
        >>> import mplus
        >>> relations = ["residence", "employer", "founder"]
        >>> config = mplus.MPlusConfig(mechanism={"name": "memllm", "relations": relations, "reads": "prompt"})
    """

    @define(frozen=True, kw_only=True)
    class Options(TextMechanism.Options):
        """Options of MemLLM; distances and thresholds are those of the paper's perplexity runs.

        Attributes:
            vectors: of names: "ngrams", "hidden:LAYER" of the decoder, or "encoder:NAME".
            entity_distance, relation_distance, score: names are near, and a pair of them counts, below these.
            most_results: names of one call.
            too_many: with more of them, the call is taken back ("drop"), or the first ones are given ("cut").
            strict: fields that are empty are refused, in queries and in triples.
            third_field: of a query for an object: such a query is "refused", or asked with the field "ignored".
            patience: places at which a write could end that are waited for (late stopping).
            write_tokens: of a call.
            relations: the vocabulary of writes; with none, any relation may be written, by a decoder that was trained.
            writes: of a text without calls: by the "decoder", or not at all ("calls").
            reads: "calls" while a text is generated, or one call for every "prompt" before that, held to what is
                stored, whose result is put in front of it.
            place: of that result: at the "start" of the prompt, or in front of what the user says last ("turn").
            constrained: calls while a text is generated are held to what is stored, too.
            field_chars: of a field; longer ones are not kept.
        """

        vectors: str = field(default="ngrams", validator=vectors_name)
        entity_distance: float = field(default=0.15, validator=number(0))
        relation_distance: float = field(default=0.15, validator=number(0))
        score: float = field(default=0.1, validator=number(0))
        most_results: int = field(default=30, validator=whole(1))
        too_many: str = field(default="drop", validator=one_of("drop", "cut"))
        strict: bool = field(default=True, validator=flag)
        third_field: str = field(default="refused", validator=one_of("refused", "ignored"))
        patience: int = field(default=5, validator=whole(1))
        write_tokens: int = field(default=96, validator=whole(1))
        relations: tuple[str, ...] = field(default=(), validator=names)
        writes: str = field(default="decoder", validator=one_of("decoder", "calls"))
        reads: str = field(default="calls", validator=one_of("calls", "prompt"))
        place: str = field(default="turn", validator=one_of("start", "turn"))
        constrained: bool = field(default=False, validator=flag)
        field_chars: int = field(default=256, validator=whole(1))

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """As the released code has it, in the variant "published"."""
            return {} if variant == "paper" else {"too_many": "cut", "strict": False, "third_field": "ignored"}

    name = "memllm"
    variants: ClassVar[Sequence[str]] = ("paper", "published")
    opens: str | None = OPENS
    closes = ARROW
    call_tokens: ClassVar[int] = 128
    keeps_calls: ClassVar[bool] = False
    repeats_calls: ClassVar[bool] = False
    options: Options

    def __init__(self, config: MPlusConfig, options: Any) -> None:
        super().__init__(config, options)
        self._vectors = TextVectors(options.vectors)
        if options.reads == "prompt":
            self.opens = None  # no call is answered while a text is generated, so that it need not come in pieces

    @property
    def place(self) -> Literal["start", "turn"]:
        return cast('Literal["start", "turn"]', self.options.place)

    def write(self, entries: Sequence[Entry], passage: str, before: str, ask: Ask) -> Sequence[tuple[str, ...]]:
        """Keep the triples of the calls in a passage; where it has none, of those that the decoder makes of it.

        Raises InputError: a call in the passage is unfinished, or has an item of other than three fields, or one
        that is empty or too long.
        """
        found: list[Triple] = []
        if f"{OPENS}{WRITE}" in passage:
            found = self._by_hand(passage)
        elif self.options.writes == "decoder":
            context = sentences_of(before)
            for sentence in sentences_of(passage):
                found += self._of_sentence(" ".join(context[-BEFORE:]), sentence, ask)
                context.append(sentence)
        known = {entry.fields for entry in entries}
        return [triple for triple in dict.fromkeys(found) if triple not in known]

    def _by_hand(self, passage: str) -> list[Triple]:
        found: list[Triple] = []
        _, *calls = passage.split(f"{OPENS}{WRITE}")
        for call in calls:
            inside, closed, _ = call.partition(CLOSES)
            items = [item for item in inside.removeprefix(ARROW).split(";") if item] if closed else [""]
            triples = [tuple(item.split(">>")) for item in items]
            most = self.options.field_chars
            sound = inside.startswith(ARROW) and all(len(one) == 3 and all(map(str.strip, one)) for one in triples)
            if not sound or any(len(part) > most for one in triples for part in one):
                raise InputError(
                    f"a write call must read {write_call(['sro'])} within one passage, with items of three fields of 1 "
                    f"to {most:,} characters, got {passage!r:.200}: write one call in a line"
                )
            found += [(one[0], one[1], one[2]) for one in triples]
        return found

    def _of_sentence(self, before: str, sentence: str, ask: Ask) -> list[Triple]:
        options = self.options
        if options.relations:
            return written_from_vocabulary(sentence, options.relations, ask, 4 * (self.config.chunk_tokens or 1))
        made = written_freely(before, sentence, ask, options.write_tokens, options.patience)
        return [
            one for one in made
            if max(map(len, one)) <= options.field_chars and (not options.strict or all(map(str.strip, one)))
        ]  # fmt: skip

    def calls(self, entries: Sequence[Entry]) -> Sequence[str]:
        """Return all calls of one query that has a match, where calls are held to what is stored."""
        return possible_calls(entries) if self.options.constrained else ()

    def answer(self, entries: Sequence[Entry], call: str, ask: Ask) -> Recalled | None:
        """Return the names that the queries of a call find, and the mark behind them; None: it is taken back."""
        if not (call.startswith(READ) and call.endswith(")")):
            return None
        body, options = call[len(READ) : -1], self.options
        queries = queries_in(body, strict=options.strict)
        if not queries or (options.third_field == "refused" and _has_third_field(body)):
            return None
        tables = Tables.of([entry.fields for entry in entries])
        found = sorted(
            ((match, query) for query in queries for match in self.matches(tables, query, ask)),
            key=lambda one: one[0].score,
        )
        names = dict.fromkeys(tables.triples[match.row][2 if query[2] is None else 0] for match, query in found)
        if not names or (options.too_many == "drop" and len(names) > options.most_results):
            return None
        best = {tables.triples[match.row]: 1 - match.score for match, _ in reversed(found)}
        used = tuple(entry for entry in entries if entry.fields in best)
        results = results_of(names, options.most_results)
        return Recalled(f"{results}{CLOSES}", used, tuple(best[entry.fields] for entry in used))

    def matches(self, tables: Tables, query: Query, ask: Ask | None) -> list[Match]:
        """Return the triples that a query finds.

        Args:
            tables: of the store.
            query: for a subject or an object.
            ask: the decoder, for vectors that are its hidden states.
        """
        options = self.options
        thresholds = Thresholds(options.entity_distance, options.relation_distance, options.score)
        return tables.query(query, lambda texts: self._vectors.of(texts, ask), thresholds)

    def recall(self, entries: Sequence[Entry], prompt: str, ask: Ask, budget: TokenBudget) -> Recalled:
        """Return what a call that is made for the prompt finds, where the option ``reads`` says so.

        Nothing where it does not fit, or where the decoder has no positions to make a call.
        """
        if self.options.reads != "prompt":
            return Recalled()
        question = f"{ASKING}{' '.join(prompt.split())}\nCall: {OPENS}"
        room = budget.tokens + budget.count(prompt) - ask.count(question) - 1
        choices = [end for call in possible_calls(entries) if budget.count(end := call + ARROW) <= room]
        if not choices:
            return Recalled()
        found = self.answer(entries, ask(question, 0, choices=choices).removesuffix(ARROW), ask) or Recalled()
        lines = ("{} {}: {}.\n".format(*entry.fields) for entry in found.entries)
        text = "".join(dict.fromkeys(lines))
        return Recalled(text, found.entries, found.scores) if budget.count(text) <= budget.tokens else Recalled()


def possible_calls(entries: Sequence[Entry]) -> list[str]:
    """Return what may stand in a call with one query: for the object and for the subject of every triple."""
    asked = ((f"{READ}{s}>>{r}>>)", f"{READ}>>{r}>>{o})") for s, r, o in (entry.fields for entry in entries))
    return list(dict.fromkeys(call for both in asked for call in both))


def _has_third_field(body: str) -> bool:
    parts = [part.split(">>") for part in body.split(";") if not part.startswith(">>")]
    return any(len(fields) > 2 and (len(fields) > 3 or fields[2] != "") for fields in parts)
