"""Retention: tell, distract, ask; accuracy over age for every arm, on the same questions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Generic, cast

import torch
from attrs import define, field

from mplus.config import JsonValue
from mplus.errors import MissingDependencyError, UnknownNameError
from mplus.evaluation.arms import BM25, EvaluationArm, FullContext, MemoryArm, NoMemory, Window
from mplus.evaluation.chat.arms import Ceiling, ChosenText
from mplus.evaluation.chat.findings import by_category, signs_of_told
from mplus.evaluation.execution.base import Answer, Due, Execution, M, W
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.execution.memory_arms import TEXT
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.snapkv import SnapKV
from mplus.memory.report import progress_bar
from mplus.timing import median, timed


@torch.no_grad()
def retention(
    execution: Execution[M, W],
    arms: ArmOptions | None = None,
    *,
    name: str | None = None,
    progress: bool | None = None,
) -> Report:
    """Run a task through every arm.

    Example:
        >>> task = Facts(ages=(0, 16, 64), streams=8, rounds=4)  # doctest: +SKIP
        >>> report = retention(ParallelStreams(model, task), ArmOptions(arms=("none", "mplus")))  # doctest: +SKIP
        >>> report.arm("mplus").at(64).accuracy  # doctest: +SKIP

    Args:
        execution: of a decoder and a task.
        arms: which are wanted, and their settings.
        name: what the report calls the model.
        progress: show a bar; None: on a terminal.

    Raises:
        UnknownNameError: an arm that does not exist.
        InputError: a file of answers belongs to another run.
        ConfigError: a mechanism or setting that the execution would not follow.
        NotSupported: an arm would measure a mechanism under another one's name.
    """
    options = execution.arm_options(arms or ArmOptions())
    execution.export_questions()
    made, skipped = make_arms(execution, options)
    results = {arm.name: ArmResult(arm) for arm in made}
    steps = execution.steps
    with progress_bar(f"telling {execution.task.name}", steps, progress, steps=steps, unit="passages") as advance:
        for number, moment in enumerate(execution.moments(advance)):
            told = [one for one in moment.due if one.question.told]
            untold = [one for one in moment.due if execution.asks_untold and not one.question.told]
            for result in results.values():
                # An arm without a limit is asked at every moment.
                if told and number < execution.moment_limits.get(result.arm.name, number + 1):
                    result.ask(moment, told)
                    result.untold += [] if result.arm.uses_labels else result.answered(moment, untold)
            with execution.one_token() as most:
                # In turns, so that what disturbs one arm disturbs all.
                for one in told:
                    for result in results.values():
                        result.time(moment, one, most)
    for result in results.values():
        told_ = [pair for pairs in result.answers.values() for pair in pairs]
        execution.export_answers(result.arm.name, [*told_, *result.untold])
    found = [result.record(execution, options.window_converged) for result in results.values()]
    alone = [cell for arm in found if arm.name == "none" for cell in arm.cells]
    borderline = sum(cell.correct for cell in alone) / sum(cell.questions for cell in alone) if alone else None
    return Report(
        protocol=execution.task.name,
        arms=(*found, *skipped),
        age_tokens=execution.age_tokens(),
        chance=execution.task.chance,
        borderline=borderline,
        theory=execution.curves(found, borderline),
        settings=execution.settings(options, {arm.name: arm.settings() for arm in made}),
        deviations=execution.task.deviations,
        circumstances=execution.run_info(name, arms=options.seed),
    )


@define(eq=False)
class ArmResult(Generic[M, W]):
    """Everything that one arm has answered so far.

    Attributes:
        arm: answers.
        answers: by age, each question with its answer.
        left_out: by age, how many questions the arm could not answer.
        seconds: spent answering.
        untold: questions whose answer was never told, each with what the arm answers.
        first_token_ms: by age, milliseconds until the first token of some answers, one question at a time.
    """

    arm: EvaluationArm[M, W]
    answers: dict[int, list[tuple[Due, Answer]]] = field(factory=dict)
    left_out: dict[int, int] = field(factory=dict)
    seconds: float = 0.0
    untold: list[tuple[Due, Answer]] = field(factory=list)
    first_token_ms: dict[int, list[float]] = field(factory=dict)

    def ask(self, moment: M, due: Sequence[Due]) -> None:
        """Let the arm answer the questions of a moment."""
        begun = time.perf_counter()
        for one, answer in zip(due, self.arm.answers(moment, due), strict=True):
            if answer is None:
                self.left_out[one.age] = self.left_out.get(one.age, 0) + 1
            else:
                self.answers.setdefault(one.age, []).append((one, answer))
        self.seconds += time.perf_counter() - begun

    def answered(self, moment: M, due: Sequence[Due]) -> list[tuple[Due, Answer]]:
        """Return the questions that the arm answers, of those given, each with its answer."""
        found = self.arm.answers(moment, due) if due else []
        return [(one, answer) for one, answer in zip(due, found, strict=True) if answer is not None]

    def time(self, moment: M, due: Due, most: int) -> None:
        """Time the first token of the answer to a question, unless ``most`` were timed at its age already."""
        found = self.first_token_ms.setdefault(due.age, [])
        if due.age not in self.left_out and len(found) < most:
            run = partial(self.arm.answers_anew, moment, [due])
            found.append(1000 * timed(run, self.arm.execution.model.device))

    def record(self, execution: Execution[M, W], converged: float) -> Arm:
        """Return the arm for a report. At an age where it could not answer every question it has no cell."""
        name, details = self.arm.name, self._details(execution)
        cells = tuple(self._cell(age) for age in self.answers if age not in self.left_out)
        if not cells:
            return Arm(name=name, status="skipped", reason="at no age do all questions fit", details=details)
        flaw = self._flaw(self.arm, execution, converged) if isinstance(self.arm, Window) else None
        return Arm(name=name, status="not_converged" if flaw else "ok", reason=flaw, cells=cells, details=details)

    def _cell(self, age: int) -> Cell:
        answered, found = self.answers[age], [answer for _, answer in self.answers[age]]
        # Of arms that choose chunks: whether the chunks that a question needs were among them.
        recalled = [answer.choice.holds(due.sources()) for due, answer in answered if answer.choice is not None]
        waited = self.first_token_ms.get(age)
        return Cell(
            age=age,
            questions=len(found),
            correct=sum(answer.correct for answer in found),
            state_bytes=max((one.state_bytes for one in found if one.state_bytes is not None), default=None),
            tokens_attended=max(
                (one.tokens_attended for one in found if one.tokens_attended is not None), default=None
            ),
            scores={name: sum(one.scores[name] for one in found) / len(found) for name in found[0].scores},
            recall=sum(recalled) / len(recalled) if recalled else None,
            first_token_ms=round(median(waited), 3) if waited else None,
            # Of many streams of facts at once, a list of thousands of answers would tell nothing more.
            outcomes={due.id: answer.correct for due, answer in answered if answer.generated is not None},
        )

    def _details(self, execution: Execution[M, W]) -> dict[str, JsonValue]:
        details: dict[str, JsonValue] = {"seconds": round(self.seconds, 3)}
        told = [pair for pairs in self.answers.values() for pair in pairs]
        details.update(by_category(told))
        details.update(signs_of_told(told, self.untold))
        if self.left_out and not execution.equal_passages:  # else it is said in the deviations
            details["questions_that_do_not_fit"] = {str(age): count for age, count in sorted(self.left_out.items())}
        return details

    def _flaw(self, window: Window[M, W], execution: Execution[M, W], converged: float) -> str | None:
        inside: dict[int, list[bool]] = {}
        for age, answers in self.answers.items():
            for due, answer in answers:
                if window.is_inside(due):
                    inside.setdefault(age, []).append(answer.correct)
        return execution.window_flaw(inside, window.tokens, converged)


def make_arms(execution: Execution[M, W], options: ArmOptions) -> tuple[list[EvaluationArm[M, W]], list[Arm]]:
    """Return the arms that can run, and a record with the reason of each one that cannot.

    Args:
        execution: of the evaluation.
        options: which are wanted.

    Raises:
        UnknownNameError: an arm that does not exist.
        InputError: a file of answers belongs to another run.
        NotSupported: an arm that reads memory was asked for, and would measure a mechanism under another one's name.
    """
    for name in options.arms or ():
        if name not in execution.arm_names:
            raise UnknownNameError(f"an arm must be one of {', '.join(execution.arm_names)}, got {name!r}")
    options = execution.arm_options(options)
    wanted = execution.arm_names if options.arms is None else options.arms
    made: list[EvaluationArm[M, W]] = []
    skipped: list[Arm] = []
    for name in wanted:
        arm = execution.unavailable.get(name) or _make(name, execution, options)
        if isinstance(arm, str):
            skipped.append(Arm(name=name, status="skipped", reason=arm))
        else:
            made.append(arm)
    return made, skipped


def _make(name: str, execution: Execution[M, W], options: ArmOptions) -> EvaluationArm[M, W] | str:
    """Return the arm, or why it cannot run."""
    if name == "none":
        return NoMemory(execution)
    if name == "window":
        return Window(execution, options.window_tokens or 0)
    if name == "full-context":
        positions = _positions(execution, options)
        return (
            FullContext(execution, positions) if positions else "the decoder's config does not say how far it can read"
        )
    if name == "ceiling":
        return Ceiling(execution, _positions(execution, options))
    if name.endswith(TEXT) and isinstance(execution, GeneratedAnswers):
        return cast("EvaluationArm[M, W]", ChosenText(execution, name))
    if name == "bm25":
        room = options.bm25_tokens, _positions(execution, options)
        try:
            return BM25(execution, options.bm25_passages or 0, *room)
        except MissingDependencyError as error:
            return str(error)
    if name == "snapkv" and isinstance(execution, GeneratedAnswers):
        if options.snapkv_answers is None:
            return "it runs in an environment of its own (benchmarks/snapkv), and no file of its answers was given"
        return cast("EvaluationArm[M, W]", SnapKV(execution, options.snapkv_answers))
    way = execution.way(name, options)
    return way if isinstance(way, str) else MemoryArm(execution, name, way)


def _positions(execution: Execution[M, W], options: ArmOptions) -> int | None:
    if options.positions is not None:
        return options.positions
    config = execution.model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)
