"""Retriever health over natural text: does it bring back what a question needs, and does that decide the answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from attrs import define, field

from mplus.environment import run_info
from mplus.errors import ConfigError
from mplus.evaluation.abstention import check_mechanism
from mplus.evaluation.ann_recall import Shortcuts
from mplus.evaluation.arms.base import Bench, Due
from mplus.evaluation.generating import Generation, answers
from mplus.evaluation.metrics.scoring import Scoring
from mplus.evaluation.retention import RetentionOptions, check_chunks, told
from mplus.evaluation.retriever_swap import retriever_for
from mplus.evaluation.tasks.base import Protocol
from mplus.evaluation.texts import Texts
from mplus.evaluation.tracing import Rows, Seen, WatchingMechanism, count_rows, scores
from mplus.hf.reading.override import reading_as
from mplus.memory.memory import Memory
from mplus.retrievers.base import Retriever


@define(eq=False)
class Count:
    """Sums over questions, for one retriever and one K0; lists have one entry per layer.

    Attributes:
        useful, found: rows in the LTM that the answer is in, and those of them that came back.
        possible, any_found: questions with such a row in the LTM, and with one retrieved.
        stored, retrieved: all rows.
        asked, right: questions.
        by_hit: of questions with no useful row left in any STM: [without a hit, with one], each [right, asked].
    """

    layers: int
    useful: list[int] = field(init=False)
    found: list[int] = field(init=False)
    possible: list[int] = field(init=False)
    any_found: list[int] = field(init=False)
    stored: list[int] = field(init=False)
    retrieved: list[int] = field(init=False)
    asked: int = 0
    right: int = 0
    by_hit: list[list[int]] = field(factory=lambda: [[0, 0], [0, 0]])

    def __attrs_post_init__(self) -> None:
        for name in ("useful", "found", "possible", "any_found", "stored", "retrieved"):
            setattr(self, name, [0] * self.layers)

    def add(self, rows: Sequence[Rows], right: bool) -> None:
        """Count one question: its ``rows`` in every layer, and whether it was answered ``right``."""
        for layer, one in enumerate(rows):
            self.useful[layer] += one.useful
            self.found[layer] += one.useful_retrieved
            self.possible[layer] += one.useful > 0
            self.any_found[layer] += one.useful_retrieved > 0
            self.stored[layer] += one.stored
            self.retrieved[layer] += one.retrieved
        self.asked += 1
        self.right += right
        if not any(one.useful_short_term for one in rows):
            pair = self.by_hit[any(one.useful_retrieved for one in rows)]
            pair[0] += right
            pair[1] += 1

    def plain(self) -> dict[str, Any]:
        """Shares; None where nothing was counted."""
        without, with_hit = self.by_hit
        return {
            "questions": self.asked,
            "accuracy": _share(self.right, self.asked),
            "gold_recall_by_layer": _shares(self.found, self.useful),
            "share_of_rows_retrieved_by_layer": _shares(self.retrieved, self.stored),
            "any_useful_row_by_layer": _shares(self.any_found, self.possible),
            "accuracy_with_hit": _share(*with_hit),
            "accuracy_without_hit": _share(*without),
            "questions_with_hit": with_hit[1],
            "questions_without_hit": without[1],
        }


@torch.no_grad()
def health(
    model: Any,
    tokenizer: Any,
    protocol: Protocol,
    *,
    options: RetentionOptions | None = None,
    retrieved_tokens: Sequence[int] | None = None,
    retrievers: Mapping[str, Retriever] | None = None,
    generation: Generation | None = None,
    scoring: Scoring | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Gold recall per layer, P(any useful row), accuracy with a hit and without, over several K0 and retrievers.

    Beside them, on the queries of the decoder's own reads: the share of the exact best rows that each retriever finds,
    and how long it takes.

    Args:
        model: a wrapped decoder with the mechanism "mplus"; put into eval mode.
        tokenizer: its tokenizer.
        protocol: makes the episodes; only told questions are asked.
        options, generation, scoring: as for ``retention``; ages at which the fact has left the STM tell most.
        retrieved_tokens: the K0 to try; None: a quarter to four times that of the config.
        retrievers: read in place of the decoder's own, which is the first in any case; None: "random".
        name: what the report calls the model.

    Raises:
        NotSupported: another mechanism.
        ConfigError: a K0 below 1.
    """
    options, scoring = options or RetentionOptions(), scoring or Scoring()
    generation = generation or Generation.of(tokenizer, tokens=protocol.answer_tokens)
    model.eval()
    check_mechanism(model)
    configured = model.mplus_config.retrieved_tokens
    tried = [configured * factor // 4 for factor in (1, 2, 4, 8, 16)] if retrieved_tokens is None else retrieved_tokens
    tried = sorted({k for k in tried if k > 0 or retrieved_tokens is not None})
    if not tried or tried[0] < 1:
        raise ConfigError(f"retrieved_tokens must be numbers of at least 1, got {tried}")
    bench = Bench(model, tokenizer, Texts(tokenizer), generation, options.separator)
    ages = options.chosen_ages(protocol.options.passages)
    episodes = protocol.episodes()
    check_chunks(bench, protocol, episodes)
    layers = model.mplus_engine.layout.layers
    own = model.mplus_engine.mechanism.additions.retriever
    others = {"random": retriever_for(model, "random")} if retrievers is None else retrievers
    read_with: dict[str, Retriever] = {"own": own, **others}
    counts = {(which, k): Count(layers) for which in read_with for k in tried}
    shortcuts = {k: Shortcuts(own, read_with, k, layers) for k in tried}
    spread: list[list[float]] = [[] for _ in range(layers)]
    for due, memory in told(bench, episodes, ages, options):
        asked = [one for one in due if one.question.told]
        for (which, k), count in counts.items():
            watch = spread if (which, k) == ("own", tried[-1]) else None
            beside = shortcuts[k] if which == "own" else None
            _ask(bench, asked, memory, read_with[which], k, scoring, count, watch, beside)
    compared = {k: one.plain() for k, one in shortcuts.items()}
    return {
        "format": 1,
        "kind": "retriever",
        "protocol": protocol.name,
        "trained_with": configured,
        "score_std_by_layer": [_share(sum(values), len(values)) for values in spread],
        "by_retrieved_tokens": {
            str(k): {which: {**counts[which, k].plain(), **compared[k][which]} for which in read_with} for k in tried
        },
        "settings": {
            "protocol": protocol.settings(),
            "ages": list(ages),
            "generation": attrs.asdict(generation),
            "scoring": attrs.asdict(scoring),
            "memory": model.mplus_config.to_dict(),
        },
        "deviations": list(protocol.deviations),
        "circumstances": run_info(model=name, seeds={"protocol": protocol.options.seed, "memory": options.seed}),
    }


def _ask(
    bench: Bench,
    due: Sequence[Due],
    memory: Memory,
    retriever: Retriever,
    k: int,
    scoring: Scoring,
    count: Count,
    spread: list[list[float]] | None,
    shortcuts: Shortcuts | None,
) -> None:
    engine, size = bench.model.mplus_engine, bench.generation.batch
    for start in range(0, len(due), size):
        part = due[start : start + size]
        streams = memory.select([one.row for one in part])
        prompts = [bench.generation.prompt(bench.texts.ids(one.question.prompt), memory=True) for one in part]
        seen: dict[int, Seen] = {}
        make = partial(WatchingMechanism, seen=seen)
        with reading_as(bench.model, retriever=retriever, retrieved_tokens=k, make=make):
            made = answers(bench.model, bench.tokenizer, prompts, bench.generation, streams)
        for row, (one, answer) in enumerate(zip(part, made, strict=True)):
            rows = [count_rows(layer, seen[layer], row, one.sources()) for layer in sorted(seen)]
            count.add(rows, scoring.is_correct(answer.text, one.question.answers))
            for layer in sorted(seen) if shortcuts is not None else ():
                if rows[layer].stored:
                    view, look = seen[layer].searched(layer, row), slice(row, row + 1)
                    views = dict.fromkeys(shortcuts.retrievers, view)  # type: ignore[union-attr]
                    shortcuts.ask(layer, seen[layer].hidden[look], seen[layer].mask[look], views)  # type: ignore[union-attr]
            if spread is not None and engine.mechanism.key_size:
                for layer in sorted(seen):
                    if rows[layer].stored > 1:
                        every = scores(engine, layer, seen[layer], row, short_term=False)
                        spread[layer].append(float(every.std(correction=0)))


def _shares(parts: Sequence[int], wholes: Sequence[int]) -> list[float | None]:
    return [_share(part, whole) for part, whole in zip(parts, wholes, strict=True)]


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
