"""Retention over age in the little language, all arms on the same streams and questions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import asdict, define, field

from mplus.errors import ConfigError, MissingDependencyError
from mplus.evaluation.metrics.forgetting_curve import curves
from mplus.evaluation.recall.arms import (
    BM25,
    Answered,
    Answerer,
    FullContext,
    MemoryArm,
    NoMemory,
    Window,
    memory_arms,
)
from mplus.evaluation.recall.facts import Telling, rounds
from mplus.evaluation.recall.selection import SelectPicker
from mplus.evaluation.reports.report import Arm, Cell, Report
from mplus.facts.episodes import Episode
from mplus.memory.writing.progress import progress_bar
from mplus.retrievers.base import Retriever
from mplus.training.batched.read import DenseDecoder
from mplus.training.batched.selection import ScorePicker
from mplus.training.batched.stream_batch import StreamBatch

CONVERGED = 0.98
"""A plain window that answers less of what lies inside it is not drawn."""

SCORING = "right where every token of the value is the most probable one given the question and the tokens before it"
DEVIATIONS = (
    "facts of a generated language instead of SQuAD and NaturalQuestions; all distractors tell facts of the same form",
    "several questions are put to one stream, at several moments, so they are not independent of each other",
    "full-context: only ages that fit into the decoder's positions; it and bm25 are slow and asked in the first rounds",
)


@define(eq=False)
class _Tally:
    """Counts of one arm."""

    asked: dict[int, int] = field(factory=dict)
    right: dict[int, int] = field(factory=dict)
    state_bytes: int = 0
    attended: int = 0
    seconds: float = 0.0

    def add(self, age: Sequence[int], answered: Answered) -> None:
        for place, n in enumerate(age):
            if bool(answered.can[place]):
                self.asked[n] = self.asked.get(n, 0) + answered.right.shape[0]
                self.right[n] = self.right.get(n, 0) + int(answered.right[:, place].sum())
        self.state_bytes = max(self.state_bytes, answered.state_bytes)
        self.attended = max(self.attended, answered.attended)

    def arm(self, name: str) -> Arm:
        cells = [
            Cell(
                age=age,
                questions=count,
                correct=self.right[age],
                state_bytes=self.state_bytes,
                tokens_attended=self.attended,
            )
            for age, count in self.asked.items()
        ]
        return Arm(name=name, cells=tuple(cells), details={"seconds": round(self.seconds, 2)})


@torch.no_grad()
def tell(model: Any, telling: Telling, episodes: Sequence[Episode], long_term_tokens: int | None = None) -> Tellings:
    """The streams of a telling, ready to be told; ``long_term_tokens`` None: that of the config.

    Raises ConfigError where streams would not do what the decoder's mechanism and settings do; it names them.
    """
    own = model.mplus_config.long_term_tokens if model.mplus_engine.mechanism.long_term else 0
    capacity = own if long_term_tokens is None else long_term_tokens
    numbers = range(len(episodes))
    # Without a limit there is room for every row ever written.
    room = telling.chunks * model.mplus_config.memory_tokens_per_chunk if capacity is None else capacity
    streams = StreamBatch(model.mplus_engine, numbers, seed=telling.seed, long_term_tokens=room)
    return Tellings(streams, episodes)


@define(eq=False)
class Tellings:
    """Streams with what they are told, chunk by chunk."""

    streams: StreamBatch
    episodes: Sequence[Episode]
    told: int = 0

    @torch.no_grad()
    def up_to(self, chunks: int, advance: Any = None) -> StreamBatch:
        """Tell on until ``chunks`` chunks have been told."""
        while self.told < chunks:
            ids = torch.stack([episode.chunks[self.told] for episode in self.episodes])
            self.streams.write(ids, torch.tensor([episode.facts[self.told] for episode in self.episodes]))
            self.told += 1
            if advance is not None:
                advance(1)
        return self.streams


@torch.no_grad()
def retention(
    model: Any,
    telling: Telling,
    *,
    window_tokens: int = 64,
    arms: Sequence[str] | None = None,
    long_term_tokens: int | None = None,
    attention: Any = None,
    retrievers: Mapping[str, Retriever] | None = None,
    circumstances: dict[str, Any] | None = None,
) -> Report:
    """Tell facts, ask for them at every age, and report every arm.

    Args:
        model: wrapped, trained on the recall language, in eval mode.
        telling: what is told and asked.
        window_tokens: of the plain window and of the chunks that BM25 brings.
        arms: names of those wanted; None: all.
        long_term_tokens: capacity of the streams; None: that of the config.
        attention: a retriever that scores by attention, for the arm "mplus-attention".
        retrievers: read with in place of the trained one, each for an arm "mplus-NAME".
        circumstances: device, versions, commit, for the report.

    Raises:
        ConfigError: an arm that does not exist, or a mechanism or setting that streams would not follow.
    """
    wanted, skipped = _arms(model, telling, window_tokens, attention)
    wanted += [MemoryArm(f"mplus-{name}", SelectPicker(one)) for name, one in (retrievers or {}).items()]
    known = [*(arm.name for arm in wanted), *(arm.name for arm in skipped)]
    for name in arms or ():
        if name not in known:
            raise ConfigError(f"arms must be some of {', '.join(known)}, got {name!r}")
    if arms is not None:
        wanted = [arm for arm in wanted if arm.name in arms]
        skipped = [arm for arm in skipped if arm.name in arms]
    episodes = telling.episodes()
    tellings = tell(model, telling, episodes, long_term_tokens)
    decoder, tallies = DenseDecoder(model), {arm.name: _Tally() for arm in wanted}
    with progress_bar("telling facts", telling.chunks, None, telling.chunks, unit="chunks") as advance:
        for number, asked in enumerate(rounds(telling, episodes)):
            streams = tellings.up_to(asked.told, advance)
            for arm in (arm for arm in wanted if arm.rounds is None or number < arm.rounds):
                begun = time.perf_counter()
                tallies[arm.name].add(asked.age, arm.answer(decoder, streams, asked, episodes))
                tallies[arm.name].seconds += time.perf_counter() - begun
    found = [_judged(tally.arm(name), telling, window_tokens) for name, tally in tallies.items()]
    config, language = model.mplus_config, telling.language
    chance = chance_of(telling, episodes)
    return Report(
        protocol="recall",
        arms=(*found, *skipped),
        age_tokens={age: float(age * telling.chunk_tokens) for age in telling.ages},
        chance=chance,
        borderline=next((_mean(arm) for arm in found if arm.name == "none"), None),
        theory=curves(telling.ages, config.memory_tokens_per_chunk, config.short_term_tokens, chance),
        settings={
            **asdict(telling),
            "window_tokens": window_tokens,
            "long_term_tokens": streams.long_term_tokens,
            "memory": config.to_dict(),
            "prompt": " ".join(language.question(0)),
            "told_as": " ".join(language.sentence(0, 0)),
            "stop_strings": [],
            "eos_token_ids": [],
            "truncation": "none",
            "scoring": SCORING,
            "people": len(language.people[telling.held_out]),
        },
        deviations=DEVIATIONS,
        circumstances=circumstances or {},
    )


def chance_of(telling: Telling, episodes: Sequence[Episode]) -> float:
    """Mean accuracy of guessing among the values of the relation asked for."""
    asked = [1 / telling.language.values(fact) for episode in episodes for fact in episode.facts]
    return sum(asked) / len(asked)


def _arms(model: Any, telling: Telling, window_tokens: int, attention: Any) -> tuple[list[Answerer], list[Arm]]:
    positions = int(model.config.max_position_embeddings)
    reading = memory_arms(model, telling.seed)
    without = "the decoder was wrapped without long-term memory"
    lacking = [] if model.mplus_engine.mechanism.uses_retriever else [arm.name for arm in reading[1:]]
    made: list[Answerer] = [NoMemory(), Window(window_tokens), *(arm for arm in reading if arm.name not in lacking)]
    skipped = [
        *(Arm(name=name, status="skipped", reason=without) for name in lacking),
        Arm(
            name="snapkv",
            status="skipped",
            reason="kvpress cannot be installed beside this version of transformers; see benchmarks/snapkv",
        ),
    ]
    if attention is None:
        skipped.append(Arm(name="mplus-attention", status="skipped", reason="no attention retriever was given"))
    else:
        made.append(MemoryArm("mplus-attention", ScorePicker(attention)))
    try:
        made.append(BM25(telling, window_tokens // telling.chunk_tokens))
    except MissingDependencyError as error:
        skipped.append(Arm(name="bm25", status="skipped", reason=str(error)))
    made.append(FullContext(positions))
    return made, skipped


def _judged(arm: Arm, telling: Telling, window_tokens: int) -> Arm:
    """A window that did not learn to use itself is no baseline; an arm that could answer nothing is skipped."""
    if not arm.cells:
        return Arm(name=arm.name, status="skipped", reason="no age fits", details=arm.details)
    if arm.name != "window":
        return arm
    inside = [cell for cell in arm.cells if cell.age < window_tokens // telling.chunk_tokens]
    worst = min((cell.accuracy for cell in inside), default=1.0)
    if worst >= CONVERGED:
        return arm
    return Arm(
        name=arm.name,
        status="not_converged",
        reason=f"accuracy inside the window is {worst:.3f}, below {CONVERGED}",
        cells=arm.cells,
        details=arm.details,
    )


def _mean(arm: Arm) -> float:
    return sum(cell.correct for cell in arm.cells) / sum(cell.questions for cell in arm.cells)
