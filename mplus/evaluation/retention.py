"""Retention over natural text: tell, distract, ask; every arm on the same episodes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field

from mplus.config import whole
from mplus.environment import run_info
from mplus.errors import ConfigError, InputError
from mplus.evaluation.arms import ArmOptions, make_arms
from mplus.evaluation.arms.base import Bench, Due, Reply, TextArm
from mplus.evaluation.arms.snapkv import export, exported
from mplus.evaluation.arms.text import Window
from mplus.evaluation.generating import Generation
from mplus.evaluation.metrics.forgetting_curve import curves
from mplus.evaluation.metrics.scoring import Scoring
from mplus.evaluation.reports.report import Arm, Cell, Report
from mplus.evaluation.tasks.base import Episode, Protocol
from mplus.evaluation.texts import Texts
from mplus.memory.memory import Memory
from mplus.memory.writing.progress import progress_bar


def _path(path: Any) -> Path | None:
    return None if path is None else Path(path)


def _ages(ages: Any) -> tuple[int, ...] | None:
    return None if ages is None else tuple(ages)


@define(frozen=True, kw_only=True)
class RetentionOptions:
    """How the harness runs.

    Attributes:
        ages: passages told between the last needed one and the question; None: 0, 1, 2, 4, 8 and so on.
        streams: episodes at a time, as batch rows of one memory; results do not depend on it.
        separator: between passages, and before the question, where they are read as one text.
        seed: of the draws of which rows leave the STM: episode i has ``seed + i``.
        export: write the questions for SnapKV to this file.
    """

    ages: tuple[int, ...] | None = field(default=None, converter=_ages)
    streams: int = field(default=8, validator=whole(1))
    separator: str = "\n"
    seed: int = field(default=0, validator=whole(0))
    export: Path | None = field(default=None, converter=_path)

    def chosen_ages(self, passages: int) -> tuple[int, ...]:
        """The ages to ask at. Raises ConfigError when one is beyond the ``passages`` that are told."""
        if self.ages is None:
            return (0, *(2**power for power in range(passages.bit_length()) if 2**power < passages))
        if not self.ages or min(self.ages) < 0 or max(self.ages) >= passages:
            raise ConfigError(
                f"ages must be at least one number from 0 to {passages - 1}, one less than the passages told, got "
                f"{list(self.ages)}: tell more passages, or ask earlier"
            )
        return tuple(sorted(set(self.ages)))


@define(eq=False)
class Tally:
    """What an arm has answered so far.

    Attributes:
        replies: per age, each question with its reply.
        seconds: spent answering.
        left_out: per age, questions that the arm cannot answer.
    """

    replies: dict[int, list[tuple[Due, Reply]]] = field(factory=dict)
    seconds: float = 0.0
    left_out: dict[int, int] = field(factory=dict)


@torch.no_grad()
def retention(
    model: Any,
    tokenizer: Any,
    protocol: Protocol,
    *,
    options: RetentionOptions | None = None,
    arms: ArmOptions | None = None,
    generation: Generation | None = None,
    scoring: Scoring | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Report:
    """Run a protocol through every arm.

    Args:
        model: a wrapped decoder; put into eval mode.
        tokenizer: its tokenizer.
        protocol: makes the episodes.
        options, arms, generation, scoring: settings; defaults are the classes' own, with the protocol's number of
            generated tokens and the tokenizer's special ids.
        name: what the report calls the model.
        progress: show a bar; None: on a terminal.

    Raises:
        InputError: the data has nothing to tell, or a passage is too short for a chunk.
        ConfigError: settings contradict each other or the decoder.
    """
    options, arms, scoring = options or RetentionOptions(), arms or ArmOptions(), scoring or Scoring()
    generation = generation or Generation.of(tokenizer, tokens=protocol.answer_tokens)
    model.eval()
    bench = Bench(model, tokenizer, Texts(tokenizer), generation, options.separator)
    ages = options.chosen_ages(protocol.options.passages)
    episodes = protocol.episodes()
    check_chunks(bench, protocol, episodes)
    questions = exported(episodes, ages, generation, options.separator)
    if options.export is not None:
        export(options.export, questions)
    made, skipped = make_arms(bench, arms, questions)
    tallies = {arm.name: Tally() for arm in made}
    total = sum(len(episode.passages) for episode in episodes)
    with progress_bar(f"telling {protocol.name}", total, progress, steps=total, unit="passages") as advance:
        for due, memory in told(bench, episodes, ages, options, advance):
            for arm in made:
                _ask(arm, due, memory, tallies[arm.name])
    found = [_arm(arm, tallies[arm.name], scoring, arms) for arm in made]
    borderline = _borderline(found)
    config = model.mplus_config
    best = next((arm.cells[0].accuracy for arm in found if arm.name == "memoryllm" and arm.cells), 1.0)
    guess = borderline if borderline is not None else protocol.chance or 0.0
    sizes = config.memory_tokens_per_chunk, config.short_term_tokens
    return Report(
        protocol=protocol.name,
        arms=(*found, *skipped),
        age_tokens=_age_tokens(bench, episodes, ages),
        chance=protocol.chance,
        borderline=borderline,
        theory=curves(ages, *sizes, chance=guess, ceiling=max(best, guess)),
        settings={
            "protocol": protocol.settings(),
            "episodes": len(episodes),
            "scoring": attrs.asdict(scoring),
            "generation": {"decoding": "greedy", **attrs.asdict(generation)},
            "harness": {**_plain(options), "ages": ages},
            "arms": {"window_converged": arms.window_converged, **{arm.name: arm.settings() for arm in made}},
            "memory": config.to_dict(),
        },
        deviations=protocol.deviations,
        circumstances=run_info(
            model=name, seeds={"protocol": protocol.options.seed, "memory": options.seed, "arms": arms.seed}
        ),
    )


def told(
    bench: Bench, episodes: Sequence[Episode], ages: Sequence[int], options: RetentionOptions, advance: Any = None
) -> Iterator[tuple[list[Due], Memory]]:
    """Tell the episodes, a batch of streams at a time; yields the questions that are due and the memory as it is then.

    Questions about what was never told are due at the same ages, counted from the same passage.
    """
    for start in range(0, len(episodes), options.streams):
        batch = episodes[start : start + options.streams]
        memory = bench.model.new_memory(batch_size=len(batch), seed=options.seed + start)
        for place in range(max(len(episode.passages) for episode in batch)):
            present = [episode.passages[place] if place < len(episode.passages) else None for episode in batch]
            ids = [None if passage is None else bench.texts.ids(passage.text) for passage in present]
            sources = [None if passage is None else passage.source for passage in present]
            memory.write(ids, source=sources, progress=False)
            due = [
                Due(episode, row, number, place - question.after)
                for row, episode in enumerate(batch)
                for number, question in enumerate(episode.questions)
                if place - question.after in ages and place < len(episode.passages)
            ]
            if due:
                yield due, memory
            if advance is not None:
                advance(sum(passage is not None for passage in present))


def check_chunks(bench: Bench, protocol: Protocol, episodes: Sequence[Episode]) -> None:
    """Every passage must be one chunk, or ages in chunks would mean nothing. Raises ConfigError, InputError."""
    config = bench.model.mplus_config
    if protocol.options.passage_tokens > config.chunk_tokens:
        raise ConfigError(
            f"passage_tokens must not exceed the decoder's chunk_tokens ({config.chunk_tokens}), got "
            f"{protocol.options.passage_tokens}: a passage is written as one chunk"
        )
    for episode in episodes:
        for passage in episode.passages:
            count = bench.texts.count(passage.text)
            if count < config.min_chunk_tokens:
                raise InputError(
                    f"a passage must have at least the decoder's min_chunk_tokens ({config.min_chunk_tokens}), "
                    f"{passage.source!r} of episode {episode.number} has {count}: raise passage_tokens, or take other "
                    "data"
                )


def _ask(arm: TextArm, due: Sequence[Due], memory: Memory, tally: Tally) -> None:
    asked = [one for one in due if one.question.told]
    begun = time.perf_counter()
    for one, reply in zip(asked, arm.reply(asked, memory) if asked else [], strict=True):
        if reply is None:
            tally.left_out[one.age] = tally.left_out.get(one.age, 0) + 1
        else:
            tally.replies.setdefault(one.age, []).append((one, reply))
    tally.seconds += time.perf_counter() - begun


def _arm(arm: TextArm, tally: Tally, scoring: Scoring, options: ArmOptions) -> Arm:
    """The record of an arm. At an age where it could not answer every question it has no cell."""
    left_out = {str(age): count for age, count in sorted(tally.left_out.items())}
    details: dict[str, Any] = {"seconds": round(tally.seconds, 3)}
    if left_out:
        details["questions_that_do_not_fit"] = left_out
    cells = tuple(_cell(age, replies, scoring) for age, replies in tally.replies.items() if age not in tally.left_out)
    if not cells:
        return Arm(name=arm.name, status="skipped", reason="at no age do all questions fit", details=details)
    if isinstance(arm, Window):
        reason = _not_converged(arm, tally, scoring, options.window_converged)
        if reason is not None:
            return Arm(name=arm.name, status="not_converged", reason=reason, cells=cells, details=details)
    return Arm(name=arm.name, cells=cells, details=details)


def _cell(age: int, replies: Sequence[tuple[Due, Reply]], scoring: Scoring) -> Cell:
    scores = [scoring.scores(reply.text, due.question.answers) for due, reply in replies]
    state = [reply.state_bytes for _, reply in replies if reply.state_bytes is not None]
    attended = [reply.tokens_attended for _, reply in replies if reply.tokens_attended is not None]
    return Cell(
        age=age,
        questions=len(replies),
        correct=sum(scoring.is_correct(reply.text, due.question.answers) for due, reply in replies),
        state_bytes=max(state, default=None),
        tokens_attended=max(attended, default=None),
        scores={name: sum(one[name] for one in scores) / len(scores) for name in scores[0]},
    )


def _not_converged(window: Window, tally: Tally, scoring: Scoring, least: float) -> str | None:
    """Why a window is no fair baseline, if it is none."""
    inside = [
        scoring.is_correct(reply.text, due.question.answers)
        for replies in tally.replies.values()
        for due, reply in replies
        if window.is_inside(due)
    ]
    if not inside:
        return f"no answer lies inside its {window.tokens} tokens as a whole, so nothing shows that it can read"
    share = sum(inside) / len(inside)
    return None if share >= least else f"{share:.2f} of {len(inside)} questions inside it, at least {least} are needed"


def _borderline(arms: Sequence[Arm]) -> float | None:
    cells = [cell for arm in arms if arm.name == "none" for cell in arm.cells]
    return sum(cell.correct for cell in cells) / sum(cell.questions for cell in cells) if cells else None


def _age_tokens(bench: Bench, episodes: Sequence[Episode], ages: Sequence[int]) -> dict[int, float]:
    """Mean number of text tokens told after the passage that age is counted from."""
    found: dict[int, list[int]] = {age: [] for age in ages}
    for episode in episodes:
        for question in episode.questions:
            for age in ages:
                since = episode.passages[question.after + 1 : question.after + 1 + age]
                if question.told and len(since) == age:
                    found[age].append(sum(bench.texts.count(passage.text) for passage in since))
    return {age: sum(counts) / len(counts) for age, counts in found.items() if counts}


def _plain(options: Any) -> dict[str, Any]:
    return {name: value.name if isinstance(value, Path) else value for name, value in attrs.asdict(options).items()}
