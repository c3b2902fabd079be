"""SCMMechanism: a memory stream of turns, the last one always in the prompt, the best ones beside it.

Liang et al., "Unleashing Infinite-Length Input Capacity for Large-scale Language Models with Self-Controlled Memory
System" (arXiv 2304.13343), sections 2.1 to 2.3. A turn is kept with its summary (the memory stream). A read puts the
last turn (flash memory) and the best k of all earlier ones (activation memory) in front of the prompt, in order. A
controller decides whether earlier turns are needed at all, and whether the summary of a long one is enough.

Faithful: items, flash and activation memory, relevance plus recency, both decisions and their limits, order in the
prompt. With ``variant="published"`` as the released code has it: no recency, no first decision, each turn judged where
all of it is too long, everything else made a summary until it fits.

Ours: a turn is a passage that is written; the time of a turn is its number in the stream, counted from its writing,
since reads change nothing here (the paper counts from its last use); relevance by words (BM25), n-grams, hidden states
or an encoder, in the place of a paid service; prompts of the controller in English; an end where the summaries
together do not fit, whose worst matches are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from attrs import Attribute, AttrsInstance, define, field
from torch import Tensor

from mplus.config import JsonValue, MPlusConfig, is_number
from mplus.mechanisms import (
    Ask,
    Entry,
    EntryState,
    Recalled,
    StreamView,
    TextMechanism,
    TextVectors,
    TokenBudget,
    must_be,
    number,
    one_of,
    vectors_name,
    whole,
)
from mplus.memory.sources.found import FoundText
from mplus.retrievers.chunks.bm25 import bm25
from mplus_scm.controller import ENOUGH, NEEDED, WORD, Controller, Mode, summary_of
from mplus_scm.forms import Form, Sizes, as_released, by_paper, form_of_last
from mplus_scm.ranking import rank

HISTORY, LAST = "Related conversation history:\n", "Previous conversation:\n"
share = must_be("a number from 0 to 1", lambda value: is_number(value, 0, 1))
"""Validator: a number from 0 to 1."""


def _relevance(instance: AttrsInstance, attribute: Attribute[str], value: JsonValue) -> None:
    if value != "words":
        vectors_name(instance, attribute, value)


@define(frozen=True)
class Turn:
    """A turn of the stream, as it may stand in the prompt.

    Attributes:
        entry: that it is made of.
        raw, summary: how it stands there.
        sizes: tokens of both.
    """

    entry: Entry
    raw: str
    summary: str
    sizes: Sizes

    def text(self, form: Form) -> str:
        """Return the turn in a form; "" where it is dropped."""
        return {"raw": self.raw, "summary": self.summary, "drop": ""}[form]


class SCMMechanism(TextMechanism):
    """A stream of turns with summaries; the last one and the best ones are put in front of the prompt.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism={"name": "scm", "turns": 4, "needed": "rule"})
    """

    @define(frozen=True, kw_only=True)
    class Options(TextMechanism.Options):
        """Options of SCM.

        Attributes:
            turns: of activation memory, k.
            relevance: "words" (BM25 as a share of what all words of the prompt give), or vectors that are compared by
                cosine: "ngrams", "hidden:LAYER" or "encoder:NAME".
            embed: what is compared with the prompt: the "text" of a turn, or its "summary".
            recency: weight of recency beside relevance.
            decay: of recency, from one turn to the next.
            needed: how it is decided whether earlier turns are needed: by the "decoder" (the likelier of two letters),
                by its "answer", by a "rule", or not at all ("off": they always are).
            enough: how it is decided whether a summary is enough, in the same ways ("off": it is).
            rule: share of the prompt's words, common ones left out, that a text must have where a rule decides.
            summaries: made by the "decoder", of the "first" sentence, or "off".
            summary_from: tokens from which a turn gets a summary.
            last_tokens: from which the last turn is shown as its summary.
            total_tokens: of activated turns from which summaries come in; as released, of all turns together.
            item_tokens: from which, then, a turn may be a summary; nothing as released.
            place: where turns stand: at the "start" of the prompt, or in front of what the user says last ("turn").
            policy: "paper" or "released": which turns become summaries or are dropped.
        """

        turns: int = field(default=6, validator=whole(1))
        relevance: str = field(default="words", validator=_relevance)
        embed: str = field(default="text", validator=one_of("text", "summary"))
        recency: float = field(default=1.0, validator=number(0))
        decay: float = field(default=0.995, validator=share)
        needed: str = field(default="decoder", validator=one_of("decoder", "answer", "rule", "off"))
        enough: str = field(default="decoder", validator=one_of("decoder", "answer", "rule", "off"))
        rule: float = field(default=0.3, validator=share)
        summaries: str = field(default="decoder", validator=one_of("decoder", "first", "off"))
        summary_from: int = field(default=300, validator=whole(1))
        last_tokens: int = field(default=500, validator=whole(1))
        total_tokens: int = field(default=2000, validator=whole(1))
        item_tokens: int = field(default=800, validator=whole(1))
        place: str = field(default="start", validator=one_of("start", "turn"))
        policy: str = field(default="paper", validator=one_of("paper", "released"))

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """As the released code has it, in the variant "published"."""
            if variant == "paper":
                return {}
            return {"recency": 0.0, "needed": "off", "enough": "answer", "total_tokens": 2500, "policy": "released"}

    name = "scm"
    variants: ClassVar[Sequence[str]] = ("paper", "published")
    sizes: ClassVar[Mapping[str, int]] = {"chunk_tokens": 512}
    options: Options

    def __init__(self, config: MPlusConfig, options: Any) -> None:
        super().__init__(config, options)
        self._vectors = None if options.relevance == "words" else TextVectors(options.relevance)

    @property
    def place(self) -> Literal["start", "turn"]:
        return cast('Literal["start", "turn"]', self.options.place)

    def write(self, entries: Sequence[Entry], passage: str, before: str, ask: Ask) -> Sequence[tuple[str, ...]]:
        """Keep the passage as a turn, with a summary of it where it is long."""
        text = passage.strip()
        if ask.count(text) <= self.options.summary_from:
            return [(text,)]
        return [(text, summary_of(text, cast("Any", self.options.summaries), ask))]

    def recall(self, entries: Sequence[Entry], prompt: str, ask: Ask, budget: TokenBudget) -> Recalled:
        """Return the activated turns, in the order of the stream, and behind them the last one."""
        *earlier, last = (_turn(entry, budget) for entry in entries)
        relevance = self._scores(entries, prompt, ask)
        options = self.options
        times = [float(turn.entry.birth) for turn in earlier]
        ranked = rank(
            relevance[:-1], times, last.entry.birth + 1.0, decay=options.decay, recency=options.recency, k=options.turns
        )
        room = budget.tokens + budget.count(prompt)
        judge = _Judge(Controller(ask, room, options.rule), prompt, earlier, last)
        best = earlier[ranked[0].turn].raw if ranked else None
        needed = ranked and judge.controller.decide(
            cast("Mode", options.needed), NEEDED.format(question=prompt), prompt, best
        )
        picked = [one.turn for one in reversed(ranked)] if needed else []
        forms = self._forms(picked, judge)
        published = options.policy == "released"
        forms[len(earlier)] = form_of_last(last.sizes, options.last_tokens, published=published)[0]
        shown = fitting({turn: forms[turn] for turn in [*picked, len(earlier)]}, [*earlier, last], budget)
        found = {one.turn: one.score for one in ranked}
        scores = [found.get(turn, float(relevance[turn])) for turn in shown]
        text = assembled(shown, [*earlier, last])
        return Recalled(text, tuple(entries[turn] for turn in shown), tuple(scores))

    def _forms(self, picked: list[int], judge: _Judge) -> dict[int, Form]:
        options, mode = self.options, cast("Mode", self.options.enough)
        sizes = {turn: judge.earlier[turn].sizes for turn in picked}
        if options.policy == "released":
            last = form_of_last(judge.last.sizes, options.last_tokens, published=True)[1]
            return dict(
                as_released(picked, sizes, last, lambda turn, form: judge(mode, turn, form), options.total_tokens).forms
            )
        raw = {turn: one.raw for turn, one in sizes.items()}
        return by_paper(
            picked, raw, lambda turn: judge(mode, turn, "summary"), options.total_tokens, options.item_tokens
        )

    def _scores(self, entries: Sequence[Entry], prompt: str, ask: Ask) -> Tensor:
        """Return ``[n]`` float64, how relevant each turn is to a prompt."""
        at = 0 if self.options.embed == "text" else -1
        texts = [entry.fields[at] for entry in entries]
        if self._vectors is not None:
            vectors = self._vectors.of([*texts, prompt], ask).double()
            return vectors[:-1] @ vectors[-1]
        words = [_words(text) for text in texts]
        counts = torch.tensor([len(one) for one in words], dtype=torch.int64)
        flat = torch.tensor([word for one in words for word in one], dtype=torch.int64)
        return bm25(counts, flat, torch.tensor(_words(prompt), dtype=torch.int64), 1.5, 0.75, relative=True)

    def search(self, decoder: Ask, view: StreamView, text: str, k: int, tokenizer: Any) -> list[FoundText]:
        """Return the most relevant turns, recency left out, the newer one first among equals."""
        state = cast("EntryState", view.state)
        entries = state.entries()
        if not entries:
            return []
        scores = self._scores(entries, text, decoder)
        newest_first = scores.flip(0).argsort(descending=True, stable=True)[:k]
        numbers = state.rows.source.tolist()
        places = [len(entries) - 1 - place for place in newest_first.tolist()]
        return [FoundText.of(state, numbers[at], float(scores[at]), entries[at].fields[0]) for at in places]


@define(frozen=True)
class _Judge:
    """Asks the controller about one form of one turn.

    Attributes:
        controller: decides.
        prompt: of the user.
        earlier, last: the turns.
    """

    controller: Controller
    prompt: str
    earlier: Sequence[Turn]
    last: Turn

    def __call__(self, mode: Mode, turn: int, form: Form) -> bool:
        text = self.earlier[turn].text(form)
        return self.controller.decide(mode, ENOUGH.format(text=text, question=self.prompt), self.prompt, text)


def fitting(forms: dict[int, Form], turns: Sequence[Turn], budget: TokenBudget) -> dict[int, Form]:
    """Return the forms with which the text fits: ever more summaries, then ever fewer turns, the last one to the end.

    Args:
        forms: by turn, the worst match first, the last turn of all at the end.
        turns: of the stream.
        budget: for the text.
    """
    forms = {turn: form for turn, form in forms.items() if form != "drop"}
    for turn in list(forms):
        if budget.count(assembled(forms, turns)) <= budget.tokens:
            return dict(sorted(forms.items()))
        if turns[turn].sizes.summary < turns[turn].sizes.raw:
            forms[turn] = "summary"
    for turn in list(forms):
        if budget.count(assembled(forms, turns)) <= budget.tokens:
            break
        del forms[turn]
    return dict(sorted(forms.items()))


def assembled(forms: Mapping[int, Form], turns: Sequence[Turn]) -> str:
    """Return the text in front of the prompt: activated turns in the order of the stream, then the last turn."""
    earlier = [turns[turn].text(forms[turn]) for turn in sorted(forms) if turn < len(turns) - 1]
    last = [turns[turn].text(forms[turn]) for turn in forms if turn == len(turns) - 1]
    return "".join([HISTORY, *earlier] if earlier else []) + "".join([LAST, *last] if last else [])


def _turn(entry: Entry, budget: TokenBudget) -> Turn:
    head = f"[Turn {entry.birth + 1}]\n"
    raw, summary = (f"{head}{text}\n\n" for text in (entry.fields[0], entry.fields[-1]))
    return Turn(entry, raw, summary, Sizes(budget.count(raw), budget.count(summary)))


def _words(text: str) -> list[int]:
    return [hash(word) for word in WORD.findall(text.casefold())]
