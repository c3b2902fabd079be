"""Report: what an evaluation found, with everything needed to read it and to make it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, TypeVar

import attrs
from attrs import define, field

from mplus.config import JsonValue, number, one_of
from mplus.errors import InputError
from mplus.evaluation.options import as_texts
from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.forgetting_curve import Curve, CurveFacts

T = TypeVar("T")
FORMAT = 1
"""Version of the JSON; a reader refuses newer ones."""

ARMS = (
    "none",
    "window",
    "memoryllm",
    "mplus",
    "mplus-random",
    "mplus-recency",
    "mplus-attention",
    "mplus-oracle",
    "bm25",
    "full-context",
    "snapkv",
)
"""Names of the arms, in the order of tables and legends."""

Status = Literal["ok", "skipped", "not_converged"]
ByAge = Mapping[str, T]
"""By age in chunks, which JSON wants as text."""


class ArmFacts(TypedDict):
    """An arm as plain data."""

    name: str
    status: Status
    reason: str | None
    accuracy_by_age: ByAge[float]
    intervals_by_age: ByAge[list[float]]
    questions_by_age: ByAge[int]
    correct_by_age: ByAge[int]
    scores_by_age: Mapping[str, ByAge[float]]
    state_bytes: int | None
    state_bytes_by_age: ByAge[int]
    tokens_attended: int | None
    tokens_attended_by_age: ByAge[int]
    recall_by_age: NotRequired[ByAge[float]]
    first_token_ms_by_age: NotRequired[ByAge[float]]
    outcomes_by_age: NotRequired[ByAge[dict[str, bool]]]
    details: dict[str, JsonValue]


class ReportFacts(TypedDict):
    """A report as plain data."""

    format: int
    kind: str
    protocol: str
    arms: list[ArmFacts]
    age_tokens: ByAge[float]
    chance: float | None
    borderline: float | None
    theory: list[CurveFacts]
    settings: dict[str, JsonValue]
    deviations: list[str]
    circumstances: dict[str, JsonValue]


def _plain(facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return facts as JSON would give them back, so that a report read again equals the one that was written."""
    try:
        plain: dict[str, JsonValue] = json.loads(json.dumps(facts))
    except (TypeError, ValueError) as error:
        raise InputError(f"the facts of a report must be plain data: {error}, got {facts!r}") from error
    return plain


def _by_age(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    return tuple(sorted(cells, key=lambda cell: cell.age))


@define(frozen=True, kw_only=True)
class Arm:
    """One way of answering, measured at every age.

    Attributes:
        name: see ``ARMS``; other names come after them.
        status: "skipped": it could not run; "not_converged": it ran, but is not good enough to be compared with.
        reason: why it is not "ok".
        cells: youngest first.
        details: further findings as plain data (recall per layer, seconds).
    """

    name: str
    status: Status = field(default="ok", validator=one_of("ok", "skipped", "not_converged"))
    reason: str | None = None
    cells: tuple[Cell, ...] = field(default=(), converter=_by_age)
    details: dict[str, JsonValue] = field(factory=dict, converter=_plain)

    def __attrs_post_init__(self) -> None:
        if (self.status == "ok") != (self.reason is None):
            raise InputError(
                f"an arm must have a reason exactly when its status is not 'ok', "
                f"got status {self.status!r} and reason {self.reason!r} for {self.name!r}"
            )
        ages = [cell.age for cell in self.cells]
        if len(set(ages)) != len(ages):
            raise InputError(f"arm {self.name!r} must have one cell per age, got ages {ages}")

    @property
    def state_bytes(self) -> int | None:
        """Return the most bytes kept at any age."""
        return max((cell.state_bytes for cell in self.cells if cell.state_bytes is not None), default=None)

    @property
    def tokens_attended(self) -> int | None:
        """Return the most rows and tokens attended at any age."""
        return max((cell.tokens_attended for cell in self.cells if cell.tokens_attended is not None), default=None)

    def at(self, age: int) -> Cell | None:
        """Return the cell of one age, if there is one."""
        return next((cell for cell in self.cells if cell.age == age), None)

    def plain(self) -> ArmFacts:
        """Return this as plain data; ages are text, as JSON wants its keys."""

        def by_age(value: Callable[[Cell], T | None]) -> dict[str, T]:
            found = {str(cell.age): value(cell) for cell in self.cells}
            return {age: one for age, one in found.items() if one is not None}

        names = sorted({name for cell in self.cells for name in cell.scores})
        plain: ArmFacts = {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "accuracy_by_age": by_age(lambda cell: cell.accuracy),
            "intervals_by_age": by_age(lambda cell: list(cell.interval)),
            "questions_by_age": by_age(lambda cell: cell.questions),
            "correct_by_age": by_age(lambda cell: cell.correct),
            "scores_by_age": {
                name: {str(cell.age): cell.scores[name] for cell in self.cells if name in cell.scores} for name in names
            },
            "state_bytes": self.state_bytes,
            "state_bytes_by_age": by_age(lambda cell: cell.state_bytes),
            "tokens_attended": self.tokens_attended,
            "tokens_attended_by_age": by_age(lambda cell: cell.tokens_attended),
            "details": self.details,
        }
        # Reports of before these were measured lack them, and so do those in which they are not.
        if recall := by_age(lambda cell: cell.recall):
            plain["recall_by_age"] = recall
        if first_token_ms := by_age(lambda cell: cell.first_token_ms):
            plain["first_token_ms_by_age"] = first_token_ms
        if outcomes := by_age(lambda cell: cell.outcomes or None):
            plain["outcomes_by_age"] = outcomes
        return plain

    @classmethod
    def from_plain(cls, plain: ArmFacts) -> Arm:
        """Read ``plain`` back; what follows from other numbers is computed anew."""
        scores = plain["scores_by_age"]
        cells = [
            Cell(
                age=int(age),
                questions=questions,
                correct=plain["correct_by_age"][age],
                state_bytes=plain["state_bytes_by_age"].get(age),
                tokens_attended=plain["tokens_attended_by_age"].get(age),
                scores={name: values[age] for name, values in scores.items() if age in values},
                recall=plain.get("recall_by_age", {}).get(age),
                first_token_ms=plain.get("first_token_ms_by_age", {}).get(age),
                outcomes=plain.get("outcomes_by_age", {}).get(age, {}),
            )
            for age, questions in plain["questions_by_age"].items()
        ]
        return cls(
            name=plain["name"],
            status=plain["status"],
            reason=plain["reason"],
            cells=tuple(cells),
            details=plain["details"],
        )


def _curves(curves: Iterable[Curve]) -> tuple[Curve, ...]:
    return tuple(curves)


def _in_order(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    place = {name: number for number, name in enumerate(ARMS)}
    return tuple(sorted(arms, key=lambda arm: place.get(arm.name, len(place))))


@define(frozen=True, kw_only=True)
class Report:
    """Accuracy over age for every arm.

    Example:
        >>> arm = Arm(name="mplus", cells=(Cell(age=0, questions=20, correct=20, tokens_attended=40),))
        >>> report = Report(protocol="squad", arms=(arm,), age_tokens={0: 0.0})
        >>> report.arm("mplus").at(0).accuracy
        1.0
        >>> Report.from_plain(report.plain()) == report
        True

    Attributes:
        protocol: what was told and asked ("recall", "squad", ...).
        arms: in the order of ``ARMS``.
        age_tokens: age in chunks -> mean number of text tokens written since.
        chance: accuracy of guessing; None where there is no such number.
        borderline: accuracy of the decoder that was told nothing; None: not measured.
        theory: predictions to draw beside the arms.
        settings: prompts, stop strings, end-of-sequence ids, truncation, scoring and sizes, all as plain data.
        deviations: where this differs from the published protocol.
        circumstances: device, versions, commit, seeds.
    """

    protocol: str
    arms: tuple[Arm, ...] = field(converter=_in_order)
    age_tokens: dict[int, float] = field(factory=dict)
    chance: float | None = field(default=None, validator=attrs.validators.optional(number(0)))
    borderline: float | None = field(default=None, validator=attrs.validators.optional(number(0)))
    theory: tuple[Curve, ...] = field(default=(), converter=_curves)
    settings: dict[str, JsonValue] = field(factory=dict, converter=_plain)
    deviations: tuple[str, ...] = field(default=(), converter=as_texts)
    circumstances: dict[str, JsonValue] = field(factory=dict, converter=_plain)

    def __attrs_post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise InputError(f"a report must have each arm once, got {', '.join(names)}")

    @property
    def ages(self) -> list[int]:
        """Return every age in chunks that some arm was asked at, ascending."""
        return sorted({cell.age for arm in self.arms for cell in arm.cells})

    def arm(self, name: str) -> Arm:
        """Return the arm called ``name``. Raises InputError when there is none."""
        found = next((arm for arm in self.arms if arm.name == name), None)
        if found is None:
            raise InputError(f"the report must have an arm {name!r}, it has {', '.join(a.name for a in self.arms)}")
        return found

    def reach(self, name: str, at_least: float = 0.9) -> float | None:
        """Return how far back an arm knows, as a multiple of what it attends to: age in tokens / attended ones.

        Taken at the greatest age up to which accuracy is at least ``at_least`` at every age measured; None: there is
        no such age, or it was not measured what the arm attends to.
        """
        last = None
        for cell in self.arm(name).cells:
            if cell.accuracy < at_least:
                break
            last = cell
        if last is None or not last.tokens_attended or last.age not in self.age_tokens:
            return None
        return self.age_tokens[last.age] / last.tokens_attended

    def plain(self) -> ReportFacts:
        """Return this as plain data."""
        return {
            "format": FORMAT,
            "kind": "retention",
            "protocol": self.protocol,
            "arms": [arm.plain() for arm in self.arms],
            "age_tokens": {str(age): tokens for age, tokens in sorted(self.age_tokens.items())},
            "chance": self.chance,
            "borderline": self.borderline,
            "theory": [curve.plain() for curve in self.theory],
            "settings": self.settings,
            "deviations": list(self.deviations),
            "circumstances": self.circumstances,
        }

    @classmethod
    def from_plain(cls, plain: ReportFacts) -> Report:
        """Read ``plain`` back.

        Raises:
            InputError: it is no report of retention, or one of a newer format.
        """
        if not isinstance(plain, Mapping) or plain.get("kind") != "retention":
            raise InputError("a report of retention must be a table with kind = 'retention'")
        if plain.get("format") != FORMAT:
            raise InputError(f"the format of a report must be {FORMAT}, got {plain.get('format')!r}: update mplus")
        try:
            return cls(
                protocol=plain["protocol"],
                arms=tuple(Arm.from_plain(arm) for arm in plain["arms"]),
                age_tokens={int(age): tokens for age, tokens in plain["age_tokens"].items()},
                chance=plain["chance"],
                borderline=plain["borderline"],
                theory=tuple(Curve.from_plain(curve) for curve in plain["theory"]),
                settings=plain["settings"],
                deviations=tuple(plain["deviations"]),
                circumstances=plain["circumstances"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"a report must have every field it was written with: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.plain(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read JSON. Raises InputError when it is none, or no report."""
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} must be valid JSON: {error}") from error
        return cls.from_plain(plain)
