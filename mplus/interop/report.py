"""CaseReport: what came of one case that was played again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from attrs import define, field
from torch import Tensor

TOLERANCE = 2e-5
"""Largest absolute error that passes in a case of M+ or MemoryLLM; their traces are float32."""

Quantity = Tensor | str | int | tuple[str | None, ...] | None
"""What a trace says exactly: whole numbers, flags, names and texts."""
ErrorScale = Literal["none", "entry", "tensor"]
"""What a difference is divided by before it is compared with the tolerance: by nothing ("none"), by 1 + the size of the
recorded entry ("entry"), or by the largest size of the recorded tensor, at least 1 ("tensor")."""


@define(eq=False)
class CaseReport:
    """Comparison of one case with its trace.

    Attributes:
        name: of the case: that of its folder, or of its file and the system that it is about.
        model: that was recorded ("mplus").
        backend, dtype: what it was replayed with.
        steps: steps replayed.
        errors: largest error by quantity, in the measure of ``scale``; infinite where shapes differ or a number is NaN;
            a quantity is absent where the case has nothing of it.
        equal: whether everything that must be equal is, by quantity.
        differences: for each quantity that is off, where its largest or first difference is.
        skipped: steps that cannot be had, each with the reason.
        quantities: what its player compares.
        tolerance: largest error that passes.
        tolerances: of quantities that have another one.
        scale: what differences are divided by.
        unplayed: why no installed package plays the case; None: one does.
    """

    name: str
    model: str
    backend: str
    dtype: str
    steps: int = 0
    errors: dict[str, float] = field(factory=dict)
    equal: dict[str, bool] = field(factory=dict)
    differences: dict[str, str] = field(factory=dict)
    skipped: dict[str, str] = field(factory=dict)
    quantities: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    tolerances: Mapping[str, float] = field(factory=dict)
    scale: ErrorScale = "none"
    unplayed: str | None = None

    @property
    def worst(self) -> float:
        """The largest error of the quantities that ``tolerance`` is for."""
        return max((error for name, error in self.errors.items() if name not in self.tolerances), default=0.0)

    def bound(self, quantity: str) -> float:
        """Return the largest error of a quantity that passes."""
        return self.tolerances.get(quantity, self.tolerance)

    def passed(self, tolerance: float | None = None) -> bool:
        """Return whether every error is within its bound and everything that must be equal is.

        A case of which nothing was compared, since every step was skipped, has not passed.

        Args:
            tolerance: in the place of all bounds; None: those of the case.
        """
        compared = len(self.skipped) < self.steps and bool(self.errors or self.equal)
        within = all(
            error <= (self.bound(quantity) if tolerance is None else tolerance)
            for quantity, error in self.errors.items()
        )
        return compared and within and all(self.equal.values())

    def measure(self, quantity: str, where: str, ours: Tensor, recorded: Tensor) -> None:
        """Note the largest difference of two tensors."""
        error = _error(ours, recorded, self.scale)
        if error > self.errors.setdefault(quantity, 0.0):
            self.errors[quantity] = error
            shapes = "" if ours.shape == recorded.shape else f", shape {list(ours.shape)} for {list(recorded.shape)}"
            self.differences[quantity] = where + shapes

    def demand(self, quantity: str, where: str, ours: Quantity, recorded: Quantity) -> None:
        """Note whether two values, or tensors of whole numbers, are equal."""
        if isinstance(ours, Tensor) and isinstance(recorded, Tensor):
            same = ours.shape == recorded.shape and bool((ours.cpu() == recorded).all())
        else:
            same = bool(ours == recorded)
        self.equal[quantity] = self.equal.get(quantity, True) and same
        if not same:
            self.differences.setdefault(quantity, where)

    def skip(self, step: str, reason: str) -> None:
        """Note that a step cannot be had, as a whole, and why; it is printed.

        Args:
            step: what it is called, once in a case.
            reason: in words for the person who reads the table.
        """
        self.skipped[step] = reason


def _error(ours: Tensor, recorded: Tensor, scale: ErrorScale) -> float:
    if ours.shape != recorded.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    expected = recorded.double()
    difference = (ours.detach().cpu().double() - expected).abs()
    if scale == "entry":
        difference = difference / (1 + expected.abs())
    elif scale == "tensor":
        difference = difference / expected.abs().max().clamp(min=1)
    error = float(difference.max())
    return float("inf") if torch.isnan(difference).any() else error
