"""Mistakes, and the checks that have to find them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import ModuleType

import attrs


@attrs.define(frozen=True)
class Subject:
    """A module that mistakes are planted in.

    Attributes:
        module: its name.
        cases: names of cases, cheap ones first.
        check: called with the module, or a copy, and the name of a case; raises AssertionError where it is wrong.
    """

    module: str
    cases: Collection[str]
    check: Callable[[ModuleType, str], None]

    def check_all(self, module: ModuleType, only: str | None = None) -> None:
        """Check every case, or only one."""
        for case in self.cases if only is None else [only]:
            self.check(module, case)


@attrs.define(frozen=True)
class Mutant:
    """``old``, which stands in the subject's module once, replaced by ``new``.

    Found by the check of one ``case``, or where none is named by that of one or another.
    """

    subject: Subject
    name: str
    old: str
    new: str
    case: str | None = None

    def __str__(self) -> str:
        return f"{self.subject.module.rpartition('.')[2]}: {self.name}"


def mutants(subject: Subject, *rows: tuple[str, ...]) -> list[Mutant]:
    """One for each (name, old, new) or (name, old, new, case)."""
    return [Mutant(subject, *row) for row in rows]
