"""RETLLMMechanism: triples in a table, written and asked by calls of the decoder.

Modarressi et al., "RET-LLM: Towards a General Read-Write Memory for Large Language Models" (arXiv 2305.14322),
section 3; no code was released. A write asks the decoder for calls ``[MEM_WRITE{a>>b>>c}]`` and keeps their triples.
While a text is generated, ``[MEM_READ{a>>b>>}:`` is answered by all matching triples, pasted behind the colon, and
decoding goes on. A field that no triple has is exchanged for the nearest one by hashed vectors.

Faithful: the calls, exact matches first, all matches, vectors as mean hidden states in hash tables of random planes.
The paper fine-tunes its decoder for both calls (LoRA); a decoder that was not fine-tuned neither writes nor asks.

Ours: which fields are exchanged (those that stand in no row of their column), the hidden states (by default the
embeddings), the number of planes and tables; ``newest``; calls held to what is stored; a call made for the prompt;
triples written by hand. Vectors are made when a field must be exchanged, and not kept in files, so that a memory goes
from decoder to decoder and ``forget`` leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, cast

from attrs import define, field
from torch import Tensor

from mplus.config import MPlusConfig
from mplus.errors import InputError
from mplus.mechanisms import (
    Ask,
    Entry,
    Recalled,
    TextMechanism,
    TextVectors,
    TokenBudget,
    flag,
    one_of,
    vectors_name,
    whole,
)
from mplus_retllm.calls import (
    READ_CLOSES,
    READ_OPENS,
    WRITE_OPENS,
    Query,
    Triple,
    query_of,
    response,
    write_call,
    writes_in,
)
from mplus_retllm.table import Neighbours, matches, random_planes

WRITING = (
    "Text: Dorothea works for Pfizer.\nCalls: [MEM_WRITE{Dorothea>>works for>>Pfizer}]\n"
    "Text: Cyrus and Tia are customers of BMW.\n"
    "Calls: [MEM_WRITE{Cyrus>>customer>>BMW}][MEM_WRITE{Tia>>customer>>BMW}]\n"
    "Text: What a fine day!\nCalls: none\nText: "
)
ASKING = (
    "Question: Where does Otto Brandt work?\nCall: [MEM_READ{Otto Brandt>>works for>>}:\n"
    "Question: Who wrote Momo?\nCall: [MEM_READ{Momo>>author>>}:\n"
    "Question: Who works for Siemens?\nCall: [MEM_READ{>>works for>>Siemens}:\nQuestion: "
)
WRITE_TOKENS = 96


class RETLLMMechanism(TextMechanism):
    """A table of triples that the decoder writes, and asks while it generates.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism={"name": "retllm", "newest": True})
    """

    @define(frozen=True, kw_only=True)
    class Options(TextMechanism.Options):
        """Options of RET-LLM.

        Attributes:
            vectors: of fields: "hidden:LAYER" of the decoder (0: its embeddings), "ngrams", or "encoder:NAME".
            planes: of a hash table: a term is near only if it lies on the same side of all of them.
            tables: hash tables; it is enough to be near in one.
            seed: of the planes.
            newest: of triples with the same first two fields only the newest counts.
            writes: triples are written by the "decoder", or only where a text has write "calls".
            reads: "calls" while a text is generated, or one call for every "prompt" before that, held to what is
                stored, whose response is put in front of it.
            place: of that response: at the "start" of the prompt, or in front of what the user says last ("turn").
            constrained: calls while a text is generated are held to what is stored, too.
            field_chars: of a field; longer ones are not kept.
        """

        vectors: str = field(default="hidden:0", validator=vectors_name)
        planes: int = field(default=4, validator=whole(1))
        tables: int = field(default=4, validator=whole(1))
        seed: int = field(default=0, validator=whole(0))
        newest: bool = field(default=False, validator=flag)
        writes: str = field(default="decoder", validator=one_of("decoder", "calls"))
        reads: str = field(default="calls", validator=one_of("calls", "prompt"))
        place: str = field(default="turn", validator=one_of("start", "turn"))
        constrained: bool = field(default=False, validator=flag)
        field_chars: int = field(default=256, validator=whole(1))

    name = "retllm"
    opens: str | None = READ_OPENS
    closes = READ_CLOSES
    call_tokens: ClassVar[int] = 96
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

        Raises InputError: a call in the passage is unfinished, has a field that is empty or too long, or not three.
        """
        most = self.options.field_chars
        if WRITE_OPENS in passage:
            found = _short(writes_in(passage), most)
            if len(found) < passage.count(WRITE_OPENS):
                raise InputError(
                    f"a write call must read {write_call('abc')} within one passage, with three fields of 1 to "
                    f"{most:,} characters, got {passage!r:.200}: write one call in a line"
                )
        elif self.options.writes == "decoder":
            said = ask(f"{WRITING}{' '.join(passage.split())}\nCalls:", WRITE_TOKENS, stop=("\n",))
            found = _short(writes_in(said), most)
        else:
            found = []
        # Where the newest counts, what is told again after something else is new.
        newest = {entry.fields[:2]: entry.fields for entry in entries}
        known = set(newest.values()) if self.options.newest else {entry.fields for entry in entries}
        return [triple for triple in dict.fromkeys(found) if triple not in known]

    def calls(self, entries: Sequence[Entry]) -> Sequence[str]:
        """Return all calls with two fields given that have a match, where calls are held to what is stored."""
        return possible_calls(entries) if self.options.constrained else ()

    def answer(self, entries: Sequence[Entry], call: str, ask: Ask) -> Recalled | None:
        """Return all matching triples, perhaps none; None where the call is no query."""
        query = query_of(call)
        if query is None:
            return None
        found = [entries[number] for number in self.matches(entries, query, ask)]
        return Recalled(response([entry.fields for entry in found]), tuple(found))

    def matches(self, entries: Sequence[Entry], query: Query, ask: Ask | None) -> list[int]:
        """Return the numbers of the entries that a query finds.

        Args:
            entries: all of the stream, oldest first.
            query: one or two fields given, None for the others.
            ask: the decoder, for vectors that are its hidden states.
        """
        options = self.options
        planes: Callable[[int], Tensor] = partial(_planes, options.tables, options.planes, options.seed)
        neighbours = Neighbours(lambda texts: self._vectors.of(texts, ask), planes)
        return matches([entry.fields for entry in entries], query, neighbours, newest=options.newest)

    def recall(self, entries: Sequence[Entry], prompt: str, ask: Ask, budget: TokenBudget) -> Recalled:
        """Return the response to a call that is made for the prompt, where the option ``reads`` says so.

        Nothing where it does not fit, or where the decoder has no positions to make a call.
        """
        if self.options.reads != "prompt":
            return Recalled()
        question = f"{ASKING}{' '.join(prompt.split())}\nCall: {READ_OPENS}"
        room = budget.tokens + budget.count(prompt) - ask.count(question) - 1
        ends = [call + READ_CLOSES for call in possible_calls(entries)]
        choices = [end for end in ends if budget.count(end) <= room]
        if not choices:
            return Recalled()
        call = ask(question, 0, choices=choices).removesuffix(READ_CLOSES)
        found = self.answer(entries, call, ask) or Recalled()
        text = "".join(f"{' '.join(entry.fields)}.\n" for entry in found.entries)
        return Recalled(text, found.entries) if budget.count(text) <= budget.tokens else Recalled()


def possible_calls(entries: Sequence[Entry]) -> list[str]:
    """Return what may stand in a read call: two fields of a triple, the first or the last one asked for."""
    asked = ((f"{one}>>{two}>>", f">>{two}>>{three}") for one, two, three in (entry.fields for entry in entries))
    return list(dict.fromkeys(call for both in asked for call in both))


def _planes(tables: int, planes: int, seed: int, width: int) -> Tensor:
    return random_planes(tables, planes, width, seed)


def _short(triples: Sequence[Triple], most: int) -> list[Triple]:
    return [triple for triple in triples if max(map(len, triple)) <= most]
