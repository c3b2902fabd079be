"""Cases in a JSON file: behaviours of systems with what went in and what came out, no tensors beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, cast

import torch
from attrs import define

from mplus.config import JsonValue
from mplus.errors import CheckpointError
from mplus.interop.golden import TracePlayer, read_json
from mplus.interop.report import CaseReport

CASE = {"id": str, "system": str, "behaviour": str, "given": dict}
"""Fields that every behaviour in a file has, beside ``expected``, and their types."""


@define(frozen=True)
class Behaviour:
    """One thing that a system does.

    Attributes:
        id: once in a file ("scm-02").
        system: that does it.
        name: of the behaviour ("ranking of turns").
        given: what goes in.
        expected: what comes out.
    """

    id: str
    system: str
    name: str
    given: Mapping[str, JsonValue]
    expected: JsonValue


class Unavailable(Exception):
    """Raised by a ``BehaviourPlayer`` for a behaviour that cannot be had; the message is the reason."""


def behaviours_in(path: Path) -> list[Behaviour]:
    """Return the behaviours in a JSON file.

    Raises CheckpointError: the file is damaged, or two of them have one id.
    """
    cases = read_json(path).get("cases")
    found = [_behaviour(path, one) for one in cases] if isinstance(cases, list) else []
    ids = [one.id for one in found]
    if not found or len(set(ids)) != len(ids):
        raise CheckpointError(f"cases in {path} must be a list of cases, each with an id of its own, got {ids}")
    return found


def _behaviour(path: Path, plain: JsonValue) -> Behaviour:
    sound = isinstance(plain, dict) and all(isinstance(plain.get(key), kind) for key, kind in CASE.items())
    if not sound or "expected" not in cast("dict[str, JsonValue]", plain):
        raise CheckpointError(f"a case in {path} must have {', '.join(CASE)} and expected, got {plain!r}")
    case = cast("dict[str, JsonValue]", plain)
    given = cast("dict[str, JsonValue]", case["given"])
    return Behaviour(str(case["id"]), str(case["system"]), str(case["behaviour"]), given, case["expected"])


class BehaviourPlayer(TracePlayer):
    """Plays the behaviours of one system in a JSON file; built as ``Player(file, backend, dtype)``.

    Floats are compared within ``tolerance``; everything else, numbers of things and the names of fields included, must
    be equal.

    Example:
        >>> class SCMPlayer(BehaviourPlayer):
        ...     system = "scm"
        ...
        ...     def compute(self, name, given):
        ...         if name == "the controller's verdict":
        ...             return verdict(given["answer"])
        ...         raise Unavailable("needs the published prompts, which are not ours")

    Attributes:
        system: whose behaviours these are; also the name that its package announces it under.
        behaviours: in the file.
    """

    system: ClassVar[str]
    tolerance = 1e-6

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        super().__init__(folder, backend, dtype)
        self.behaviours = [one for one in behaviours_in(folder) if one.system == self.system]
        if not self.behaviours:
            raise CheckpointError(f"{folder} must have cases of the system {self.system!r}, and has none")

    @property
    def compared(self) -> tuple[str, ...]:
        """Return the names of the behaviours in the file, each once."""
        return tuple(dict.fromkeys(one.name for one in self.behaviours))

    def __len__(self) -> int:
        return len(self.behaviours)

    @abstractmethod
    def compute(self, name: str, given: Mapping[str, JsonValue]) -> JsonValue:
        """Return what comes out of a behaviour. Raises Unavailable where it cannot be had, with the reason."""

    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        for one in self.behaviours:
            try:
                ours = self.compute(one.name, one.given)
            except Unavailable as reason:
                report.skip(f"{one.id} ({one.name})", str(reason))
            else:
                _compare(report, one.name, one.id, ours, one.expected)
            yield


def _compare(report: CaseReport, quantity: str, where: str, ours: JsonValue, recorded: JsonValue) -> None:
    """Compare two JSON values part by part."""
    if isinstance(ours, dict) and isinstance(recorded, dict):
        report.demand(quantity, f"{where}, names of fields", tuple(sorted(ours)), tuple(sorted(recorded)))
        for name in ours.keys() & recorded.keys():
            _compare(report, quantity, f"{where}, {name}", ours[name], recorded[name])
    elif isinstance(ours, list) and isinstance(recorded, list):
        report.demand(quantity, f"{where}, length", len(ours), len(recorded))
        for place, (one, other) in enumerate(zip(ours, recorded, strict=False)):
            _compare(report, quantity, f"{where}, item {place}", one, other)
    elif isinstance(recorded, float) and isinstance(ours, (int, float)) and not isinstance(ours, bool):
        numbers = torch.tensor([ours, recorded], dtype=torch.float64)
        report.measure(quantity, where, numbers[0], numbers[1])
    else:
        same = type(ours) is type(recorded) and ours == recorded
        report.demand(quantity, where, same, True)
