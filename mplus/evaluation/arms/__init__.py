"""The arms of the harness over natural text: which of those asked for can run, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from mplus.config import number, whole
from mplus.errors import MissingDependencyError, NotSupported, UnknownNameError
from mplus.evaluation.arms.base import Bench, TextArm
from mplus.evaluation.arms.bm25 import BM25
from mplus.evaluation.arms.memory import MemoryArm
from mplus.evaluation.arms.snapkv import SnapKV
from mplus.evaluation.arms.text import FullContext, NoMemory, Window
from mplus.evaluation.reports.report import ARMS, Arm
from mplus.evaluation.retriever_swap import Recency, retriever_for
from mplus.training.batched.semantics import FOLLOWED

WITHOUT_MEMORY = ("none", "window", "full-context", "snapkv", "bm25")
"""Arms that run the decoder alone."""


def _names(names: Any) -> tuple[str, ...]:
    return tuple(names)


def _path(path: Any) -> Path | None:
    return None if path is None else Path(path)


@define(frozen=True, kw_only=True)
class ArmOptions:
    """Which arms are wanted, and their settings.

    Attributes:
        arms: names.
        window_tokens: of the plain window; None: as many as M+ attends to: begin row, K0 and N.
        window_converged: a window that answers a smaller share of what lies inside it is not to be compared with.
        bm25_passages, bm25_tokens: most passages in front of the question, and room for them; None: as ``positions``.
        positions: of the decoder, for full-context and bm25; None: its ``max_position_embeddings``.
        snapkv_answers: file of answers; None: the arm is skipped.
        seed: of the random retriever.
    """

    arms: tuple[str, ...] = field(default=ARMS, converter=_names)
    window_tokens: int | None = field(default=None, validator=whole(1, optional=True))
    window_converged: float = field(default=0.98, validator=number(0, 1.01))
    bm25_passages: int = field(default=4, validator=whole(1))
    bm25_tokens: int | None = field(default=None, validator=whole(1, optional=True))
    positions: int | None = field(default=None, validator=whole(1, optional=True))
    snapkv_answers: Path | None = field(default=None, converter=_path)
    seed: int = field(default=0, validator=whole(0))

    def __attrs_post_init__(self) -> None:
        for name in self.arms:
            if name not in ARMS:
                raise UnknownNameError(f"an arm must be one of {', '.join(ARMS)}, got {name!r}")


def make_arms(
    bench: Bench, options: ArmOptions, questions: Sequence[Mapping[str, Any]]
) -> tuple[list[TextArm], list[Arm]]:
    """The arms that can run, and a record with the reason of each one that cannot.

    Args:
        bench: what all arms share.
        options: which are wanted.
        questions: what ``exported`` gives for this run.

    Raises:
        InputError: a file of answers belongs to another run.
        NotSupported: an arm that reads memory was asked for, and would measure a mechanism under another one's name.
    """
    _check_mechanism(bench.model.mplus_config.mechanism.name, options.arms)
    made: list[TextArm] = []
    skipped: list[Arm] = []
    for name in options.arms:
        arm = _make(name, bench, options, questions)
        if isinstance(arm, str):
            skipped.append(Arm(name=name, status="skipped", reason=arm))
        else:
            made.append(arm)
    return made, skipped


def _check_mechanism(mechanism: str, arms: Sequence[str]) -> None:
    """Raise NotSupported where arms are asked for that read memory by another mechanism than they are named after."""
    reading = [name for name in arms if name not in WITHOUT_MEMORY]
    if mechanism not in FOLLOWED and reading:
        raise NotSupported(
            f"the arms {', '.join(reading)} measure the mechanisms {' and '.join(map(repr, FOLLOWED))}, and the "
            f"decoder's mechanism is {mechanism!r}: none of them would measure it under its own name. Ask for some of "
            f"the arms {', '.join(WITHOUT_MEMORY)}, or measure it with a program of your own"
        )


def _make(name: str, bench: Bench, options: ArmOptions, questions: Sequence[Mapping[str, Any]]) -> TextArm | str:
    """The arm, or why it cannot run."""
    config = bench.model.mplus_config
    window = options.window_tokens or 1 + config.retrieved_tokens + config.short_term_tokens
    if name == "none":
        return NoMemory(bench)
    if name == "window":
        return Window(bench, window)
    if name == "full-context":
        positions = options.positions or _positions(bench.model)
        return FullContext(bench, positions) if positions else "the decoder's config does not say how far it can read"
    if name == "bm25":
        try:
            return BM25(bench, options.bm25_passages, options.bm25_tokens, options.positions or _positions(bench.model))
        except MissingDependencyError as error:
            return str(error)
    if name == "snapkv":
        if options.snapkv_answers is None:
            return "it runs in an environment of its own (benchmarks/snapkv), and no file of its answers was given"
        return SnapKV(bench, options.snapkv_answers, questions)
    return _memory_arm(name, bench, options)


def _memory_arm(name: str, bench: Bench, options: ArmOptions) -> TextArm | str:
    mechanism = bench.model.mplus_engine.mechanism
    retrieves = mechanism.uses_retriever and mechanism.config.long_term_tokens != 0
    if name == "memoryllm":
        return MemoryArm(bench, name, retrieved_tokens=0 if retrieves else None)
    if not retrieves:
        return "the decoder was wrapped without long-term memory"
    if name == "mplus":
        return MemoryArm(bench, name)
    if name == "mplus-oracle":
        return MemoryArm(bench, name, oracle=True)
    if name == "mplus-recency":
        return MemoryArm(bench, name, retriever=Recency(mechanism.additions.retriever.shape))
    settings = {"seed": options.seed} if name == "mplus-random" else {}
    try:
        return MemoryArm(bench, name, retriever=retriever_for(bench.model, name.removeprefix("mplus-"), **settings))
    except (NotSupported, UnknownNameError, MissingDependencyError) as error:
        return str(error)


def _positions(model: Any) -> int | None:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)
