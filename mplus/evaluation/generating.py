"""Answers: generated greedily from prompts, with or without memory, and scored against the accepted ones."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, Literal, NotRequired, TypedDict

import attrs
import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue, flag, one_of, whole
from mplus.errors import ConfigError
from mplus.evaluation.chat.choice import Choice
from mplus.evaluation.chat.prompt import ChatPrompt
from mplus.evaluation.options import as_numbers, as_texts
from mplus.evaluation.tasks.base import Episode
from mplus.evaluation.texts import Tokenizer
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.reading import recalled_tokens
from mplus.hf.types import Cache
from mplus.memory.memory import Memory

SHARED = 256
"""Tokens that prompts have to begin alike with, so that these are computed once for all of them."""


@define(frozen=True, kw_only=True)
class Generation:
    """Settings of answers, which are always generated greedily.

    Example:
        >>> generation = Generation(tokens=5, bos=1)
        >>> generation.prompt([7, 8], memory=False), generation.prompt([7, 8], memory=True)
        ([1, 7, 8], [7, 8])

    Attributes:
        tokens: generated for each answer.
        eos: end-of-sequence ids; an answer ends before the first of them.
        bos: id in front of prompts that are read without memory; None: none.
        bos_with_memory: put it in front of prompts with memory too, where the begin row stands already.
        batch: prompts at a time. Padding is on the left, and masked.
    """

    tokens: int = field(default=10, validator=whole(1))
    eos: tuple[int, ...] = field(default=(), converter=as_numbers)
    bos: int | None = field(default=None, validator=whole(0, optional=True))
    bos_with_memory: bool = field(default=False, validator=flag)
    batch: int = field(default=16, validator=whole(1))

    @classmethod
    def of(cls, tokenizer: Tokenizer, **settings: Any) -> Generation:
        """Make settings with the ids of ``tokenizer``, but for what ``settings`` say."""
        eos = getattr(tokenizer, "eos_token_id", None)
        known = {"eos": () if eos is None else (eos,), "bos": getattr(tokenizer, "bos_token_id", None)}
        return cls(**{**known, **settings})

    def prompt(self, ids: Sequence[int], memory: bool) -> list[int]:
        """Return ``ids`` with the begin-of-sequence id where that belongs."""
        bos = self.bos if self.bos_with_memory or not memory else None
        return [*ids] if bos is None else [bos, *ids]


@define(frozen=True, eq=False)
class Generated:
    """One answer.

    Attributes:
        text: before stop strings are looked for.
        ids: up to the first end-of-sequence id.
        entropy: of the distribution of the first token, in nats.
        top: probability of the likeliest first token.
        likelihood: mean log-probability of the tokens generated, in nats.
        cache_bytes: bytes of the key/value cache per token of text, this row's share.
        choice: what a memory of text gave to the answer; None: it was read without one.
        recalled_tokens: that a memory of text put into the prompt; None: it is not known.

    Of a text that is generated in pieces, since calls in it are answered, distributions are not known: they are NaN.
    """

    text: str
    ids: tuple[int, ...]
    entropy: float
    top: float
    likelihood: float
    cache_bytes: float
    choice: Choice | None = None
    recalled_tokens: int | None = 0

    @property
    def known_likelihood(self) -> float | None:
        """``likelihood``, or None where it is not known."""
        return None if math.isnan(self.likelihood) else self.likelihood


@torch.no_grad()
def answers(
    model: MemoryModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    memory: Memory | None = None,
) -> list[Generated]:
    """Generate one answer per prompt.

    Prompts without memory that begin alike for ``SHARED`` tokens or more are read behind one pass over what they begin
    with.

    Args:
        model: a wrapped decoder.
        tokenizer: turns ids back into text.
        prompts: complete ids of each prompt, none empty.
        generation: the settings.
        memory: one stream per prompt, or None.

    Raises:
        ConfigError: an empty prompt.
    """
    if not all(prompts):
        raise ConfigError("every prompt must have at least one token, one of them has none: see the prompt setting")
    found: dict[int, Generated] = {}
    for places, begin in _beginnings(prompts) if memory is None else ():
        cache = model(input_ids=torch.tensor([begin], device=model.mplus_engine.device), logits_to_keep=1)
        for place in places:
            # A copy: what one question appends, the next one must not read.
            behind = copy.deepcopy(cache.past_key_values)
            found[place] = _batch(model, tokenizer, [prompts[place]], generation, cache=behind)[0]
    left = [place for place in range(len(prompts)) if place not in found]
    for start in range(0, len(left), generation.batch):
        part = left[start : start + generation.batch]
        rows = None if memory is None else memory.select(part)
        found.update(zip(part, _batch(model, tokenizer, [prompts[n] for n in part], generation, rows), strict=True))
    return [found[place] for place in range(len(prompts))]


def _beginnings(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the places of prompts that begin alike for ``SHARED`` tokens or more, and what all of these begin with."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        if len(prompt) > SHARED:
            alike.setdefault(tuple(prompt[:SHARED]), []).append(place)
    for places in alike.values():
        some = [prompts[place] for place in places]
        columns = zip(*(prompt[:-1] for prompt in some), strict=False)  # each has a token of its own left to read
        begin = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        if len(places) > 1:
            yield places, begin


def _batch(
    model: MemoryModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    memory: Memory | None = None,
    cache: Cache | None = None,
) -> list[Generated]:
    longest = max(map(len, prompts))
    device = model.mplus_engine.device
    # Any id will do where the mask is 0.
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    engine = model.mplus_engine
    recalls = isinstance(engine, TextEngine) and memory is not None
    in_pieces = isinstance(engine, TextEngine) and memory is not None and engine.mechanism.opens is not None
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=generation.tokens,
        # An id that is never generated: where an answer ends is decided afterwards, for each row by itself.
        eos_token_id=engine.vocab_size,
        pad_token_id=next(iter(generation.eos), 0),  # behind a text whose calls leave no room for more
        return_dict_in_generate=True,
        output_logits=not in_pieces,
        output_sources=recalls,
        memory=memory,
        past_key_values=cache,
    )
    made = output.sequences[:, longest:]
    entropy, top, chosen = _distributions(output.logits, made)
    size = cache_bytes(output.past_key_values) / ids.shape[0] / (longest + generation.tokens - 1)
    choices = [Choice.told(layers) for layers in output.memory_sources] if recalls else [None] * len(prompts)
    recalled = recalled_tokens(output, len(prompts)) if recalls else [0] * len(prompts)
    found = []
    for row in range(len(prompts)):
        kept = list(takewhile(lambda token: token not in generation.eos, made[row].tolist()))
        found.append(
            Generated(
                text=tokenizer.decode(kept, skip_special_tokens=True),
                ids=tuple(kept),
                entropy=float(entropy[row]),
                top=float(top[row]),
                likelihood=float(chosen[row, : max(len(kept), 1)].mean()),
                cache_bytes=size,
                choice=choices[row],
                recalled_tokens=recalled[row],
            )
        )
    return found


def _distributions(logits: Sequence[Tensor] | None, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return entropy and highest probability of the first token, ``[B]``, and log-probabilities of all ``[B, n]``."""
    if logits is None:
        unknown = torch.full(made.shape, torch.nan)
        return unknown[:, 0], unknown[:, 0], unknown
    every = torch.stack(list(logits), 1).float().log_softmax(-1)  # [B, tokens, V]
    first = every[:, 0]
    # An impossible token has log-probability -inf, and 0 times that would be NaN.
    entropy = -(first.exp() * first.clamp(min=-1e30)).sum(-1)
    return entropy, first.max(-1).values.exp(), every.gather(2, made[:, :, None])[:, :, 0]


def cache_bytes(cache: Cache | None) -> int:
    """Return the bytes of the tensors in a key/value cache; 0 where it is not made of layers."""
    layers = getattr(cache, "layers", None) or []
    return sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, Tensor))


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@define(frozen=True, kw_only=True)
class Scoring:
    """Every rule that decides whether an answer counts.

    Example:
        >>> scoring = Scoring(correct="contains_words", normalise="squad")
        >>> scoring.is_correct("In the Old Mill.", ["mill"]), scoring.is_correct("The miller.", ["mill"])
        (True, False)
        >>> scoring.scores("the old mill", ["mill"])["f1"]
        0.6666666666666666

    Attributes:
        correct: "contains": an accepted answer is a part of the text (published); "contains_words": of whole words;
            "exact": it is the text.
        normalise: "none" compares letter by letter (published); "squad" without case, punctuation and articles.
        stop: the text ends before the first of these.
    """

    correct: Literal["contains", "contains_words", "exact"] = field(
        default="contains", validator=one_of("contains", "contains_words", "exact")
    )
    normalise: Literal["none", "squad"] = field(default="none", validator=one_of("none", "squad"))
    stop: tuple[str, ...] = field(default=("\n",), converter=as_texts)

    def cut(self, text: str) -> str:
        """Return ``text`` up to the first stop string, without the blanks around it."""
        ends = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(ends, default=len(text))].strip()

    def is_correct(self, text: str, answers: Sequence[str]) -> bool:
        """Return whether ``text``, which is cut first, holds or is one of ``answers``."""
        return any(self._matches(self.cut(text), answer) for answer in answers)

    def scores(self, text: str, answers: Sequence[str]) -> dict[str, float]:
        """Return ``exact_match`` and ``f1`` of words as SQuAD defines them, the best over ``answers``."""
        text = self.cut(text)
        return {
            "exact_match": float(any(normalised(text) == normalised(answer) for answer in answers)),
            "f1": max((f1(text, answer) for answer in answers), default=0.0),
        }

    def _matches(self, text: str, answer: str) -> bool:
        # An answer of articles and punctuation only would be nothing, and that is part of every text.
        normalise = self.normalise == "squad" and normalised(answer) != ""
        text, answer = (normalised(text), normalised(answer)) if normalise else (text, answer.strip())
        if self.correct == "exact":
            return text == answer
        if self.correct == "contains_words":
            return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
        return answer in text


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, one blank between words (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(text: str, answer: str) -> float:
    """Return the F1 of the words of ``text`` against those of ``answer``, both normalised (SQuAD)."""
    given, wanted = normalised(text).split(), normalised(answer).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


FORMAT = 1
"""Of the files of questions and answers of arms that run elsewhere (``benchmarks/snapkv``)."""


class ExportedHead(TypedDict):
    """The first line of a file of questions: how to answer, with a digest of all.

    Of a chat model, ``begin`` are the ids in front of what was told.
    """

    format: int
    separator: str
    generation: dict[str, JsonValue]
    begin: NotRequired[list[int]]
    digest: str


class ExportedQuestion(TypedDict):
    """A question, and when it is asked; of a chat model, ``ids`` are those behind what was told."""

    number: int
    prompt: str
    ids: NotRequired[list[int]]
    after: int
    ages: list[int]


class ExportedEpisode(TypedDict):
    """An episode: every further line of a file of questions."""

    episode: int
    passages: list[str]
    questions: list[ExportedQuestion]


def exported(
    episodes: Sequence[Episode],
    ages: Sequence[int],
    generation: Generation,
    separator: str,
    chat: ChatPrompt | None = None,
) -> tuple[ExportedHead, list[ExportedEpisode]]:
    """Return the lines of a file of questions: first how to answer, then one line per episode."""
    lines: list[ExportedEpisode] = [
        {
            "episode": episode.number,
            "passages": [passage.text for passage in episode.passages],
            "questions": [
                {
                    "number": number,
                    "prompt": question.prompt,
                    "after": question.after,
                    "ages": [age for age in ages if question.after + age < len(episode.passages)],
                }
                for number, question in enumerate(episode.questions)
            ],
        }
        for episode in episodes
    ]
    head: ExportedHead = {
        "format": FORMAT,
        "separator": separator,
        "generation": attrs.asdict(generation),
        "digest": "",
    }
    if chat is not None:
        head["begin"] = list(chat.begin)
        for question in (one for line in lines for one in line["questions"]):
            question["ids"] = chat.prompt(question["prompt"])[len(chat.begin) :]
    how = {name: value for name, value in head.items() if name != "digest"}
    head["digest"] = hashlib.sha256(json.dumps([how, lines], sort_keys=True).encode()).hexdigest()
    return head, lines
