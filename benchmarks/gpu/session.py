"""Session: what a part of a run is given, where it writes what it finds, and the gates that it opens."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from mplus.errors import MissingDependencyError, NotSupported
from mplus.testing.rounding import allowed, error

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


class GateError(Exception):
    """Something computes other numbers than its reference."""


class DeviceLostError(Exception):
    """An error has left the GPU unusable for this process, so that nothing after it would say anything."""


def write_line(file: Path, **facts: Any) -> None:
    """Append one JSON line to a file that several processes write to."""
    line = json.dumps(facts, ensure_ascii=False, default=str) + "\n"
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


@define
class Gate:
    """One comparison, or several of one thing.

    Attributes:
        error, allowed: of the comparison that came nearest to what is allowed.
    """

    error: float | None = None
    allowed: float | None = None

    def close(self, found: Tensor, plain: Tensor, exact: Tensor, *moved: Tensor, extra: float = 0.0) -> None:
        """Compare a result with the truth; the rounding of a plain computation on a CPU says how far it may be off.

        Args:
            found: the result, on any device.
            plain: the same computed plainly on the CPU, in the dtype in use.
            exact: the same in float64.
            *moved: further plain computations, on the device for instance.
            extra: allowed besides, for an approximation whose error is known.

        Raises:
            GateError: it is farther off.
        """
        size, most = error(found, exact), allowed(plain, exact, *moved) + extra
        if self.error is None or size * (self.allowed or 0) >= self.error * most:
            self.error, self.allowed = size, most
        if not size <= most:
            raise GateError(f"differs from float64 by {size:.3g}, allowed are {most:.3g}")

    def same(self, found: Tensor | None, expected: Tensor | None, what: str = "it") -> None:
        """Compare bit for bit; NaN equals NaN. Raises GateError."""
        if found is None or expected is None:
            if found is not expected:
                raise GateError(f"{what} is {'missing' if found is None else 'there'} and should not be")
            return
        found, expected = found.detach().cpu(), expected.detach().cpu()
        if found.dtype != expected.dtype or found.shape != expected.shape:
            raise GateError(
                f"{what} is {list(found.shape)} {found.dtype} in place of {list(expected.shape)} {expected.dtype}"
            )
        same = torch.equal(*(part.contiguous().reshape(-1).view(torch.uint8) for part in (found, expected)))
        self.error, self.allowed = 0.0 if same else error(found, expected), 0.0
        if not same:
            raise GateError(f"{what} differs by up to {self.error:.3g}, and should be the same to the last bit")

    def holds(self, condition: bool, reason: str) -> None:
        """Raise GateError with ``reason`` unless a condition holds."""
        if not condition:
            raise GateError(reason)


@define
class Session:
    """One part of a run.

    Attributes:
        part: its name.
        file: results, one JSON line each.
        device: that is tried; a CPU in a rehearsal.
        tiny: take the smallest sizes, as in a rehearsal.
        few: of each kind only some cases, for a rehearsal of seconds.
        interpret: kernels are interpreted.
    """

    part: str
    file: Path
    device: torch.device
    tiny: bool = False
    few: bool = False
    interpret: bool = False
    failed: list[str] = field(factory=list)

    def write(self, kind: str, **facts: Any) -> None:
        """Write one result."""
        write_line(self.file, kind=kind, part=self.part, **facts)

    @contextmanager
    def gate(self, name: str) -> Iterator[Gate]:
        """Run one gate and write its outcome; what goes wrong is its reason, and the next gate runs all the same.

        Raises:
            DeviceLostError: the GPU takes nothing more from this process.
        """
        gate, begun, status, reason = Gate(), time.perf_counter(), OK, None
        try:
            yield gate
            self.synchronise()
        except (NotSupported, MissingDependencyError) as refusal:
            status, reason = SKIPPED, str(refusal)
        except Exception as problem:  # noqa: BLE001 - what is tried may fail in any way
            status, reason = FAILED, f"{type(problem).__name__}: {problem}"[:2000]
            self.failed.append(name)
        seconds = round(time.perf_counter() - begun, 3)
        facts = {"error": gate.error, "allowed": gate.allowed, "reason": reason}
        self.write("gate", gate=name, status=status, seconds=seconds, **facts)
        if status == FAILED:
            self._check_device(name)

    def _check_device(self, name: str) -> None:
        try:
            self.synchronise()
            torch.ones(1, device=self.device).sum().item()
        except RuntimeError as lost:
            raise DeviceLostError(f"the GPU is of no more use to this process after {name}: {lost}") from lost

    def synchronise(self) -> None:
        """Wait for the device, so that errors show where they were made."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
