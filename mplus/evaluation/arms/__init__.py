"""The arms of an evaluation: which of those asked for can run, and why the others cannot."""

from __future__ import annotations

from typing import Any

from mplus.errors import MissingDependencyError, UnknownNameError
from mplus.evaluation.arms.base import EvaluationArm, MemoryArm
from mplus.evaluation.arms.snapkv import SnapKV
from mplus.evaluation.arms.text import BM25, FullContext, NoMemory, Window
from mplus.evaluation.execution.base import Execution
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports.report import Arm


def make_arms(execution: Execution[Any, Any], options: ArmOptions) -> tuple[list[EvaluationArm], list[Arm]]:
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
    made: list[EvaluationArm] = []
    skipped: list[Arm] = []
    for name in wanted:
        arm = execution.unavailable.get(name) or _make(name, execution, options)
        if isinstance(arm, str):
            skipped.append(Arm(name=name, status="skipped", reason=arm))
        else:
            made.append(arm)
    return made, skipped


def _make(name: str, execution: Execution[Any, Any], options: ArmOptions) -> EvaluationArm | str:
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
    if name == "bm25":
        room = options.bm25_tokens, _positions(execution, options)
        try:
            return BM25(execution, options.bm25_passages or 0, *room)
        except MissingDependencyError as error:
            return str(error)
    if name == "snapkv" and isinstance(execution, GeneratedAnswers):
        if options.snapkv_answers is None:
            return "it runs in an environment of its own (benchmarks/snapkv), and no file of its answers was given"
        return SnapKV(execution, options.snapkv_answers)
    way = execution.way(name, options)
    return way if isinstance(way, str) else MemoryArm(execution, name, way)


def _positions(execution: Execution[Any, Any], options: ArmOptions) -> int | None:
    if options.positions is not None:
        return options.positions
    config = execution.model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)
