"""Runs the parts, each in a process of its own, within the time of the whole run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import define, field

from benchmarks.gpu.packages import ROOT
from benchmarks.gpu.plan import Part

AT_A_TIME = 6
"""Gates that run beside one another: they compute little, and most of their time goes into starting and compiling."""
FOR_GATES = 0.6
"""Share of a run's time after which no gate goes on, so that something is left for what is timed."""
PATIENCE = 4.0
LEAST = 15.0
"""Seconds below which no part is begun: it would hardly have started."""
REASON = 2000
"""Characters of a part's output that its failure is told with."""


def command_of(part: Part, results: Path, options: Sequence[str]) -> list[str]:
    """Return the command line of a part's process."""
    return [sys.executable, "-m", "benchmarks.gpu.part", part.name, str(results), *options]


@define
class Runner:
    """One run.

    Attributes:
        results: the file of JSON lines that every part appends to.
        logs: folder for what the processes print; the end of it is among the results where a part fails.
        seconds: of the whole run.
        options: of every part's process.
        rehearsal: nothing is on a GPU; kernels are interpreted, and each part has ``PATIENCE`` times as long.
        at_a_time: processes of parts that take no times.
        command: makes the command line of a part.
        say: is told of every part that has ended.
    """

    results: Path
    logs: Path
    seconds: float
    options: Sequence[str] = ()
    rehearsal: bool = False
    at_a_time: int = AT_A_TIME
    command: Callable[[Part, Path, Sequence[str]], list[str]] = command_of
    say: Callable[[str], None] = print
    _end: float = field(init=False, default=0.0)
    _running: set[subprocess.Popen[bytes]] = field(init=False, factory=set)

    def run(self, parts: Iterable[Part]) -> bool:
        """Run all parts: the first alone, those without times beside one another, the others one by one.

        Returns:
            Whether everything went well.
        """
        begun = time.monotonic()
        self._end = begun + FOR_GATES * self.seconds
        first, *rest = parts
        went_well = [self.run_part(first)]
        with ThreadPoolExecutor(self.at_a_time) as pool:
            try:
                went_well += pool.map(self.run_part, [part for part in rest if not part.timed])
            except BaseException:  # an interrupt: no part begins, and nothing is left running
                self._end = begun
                for process in list(self._running):
                    _end_group(process)
                raise
        self._end = begun + self.seconds
        went_well += [self.run_part(part) for part in rest if part.timed]
        return all(went_well)

    def run_part(self, part: Part) -> bool:
        """Run one part and write how it ended, unless it has done so itself. Returns whether it went well."""
        patience = PATIENCE if self.rehearsal else 1.0
        limit = min(patience * part.seconds, self._end - time.monotonic())
        if limit < min(LEAST, part.seconds):
            return self._ended(part, "skipped", f"not run: too little was left of {self.seconds:.0f} seconds", 0.0)
        begun = time.monotonic()
        log = self.logs / f"{part.name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(part, self.results, self.options),
                cwd=ROOT,
                env=self._environment(part),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that whatever it starts ends with it
            )
            self._running.add(process)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                _end_group(process)
                return self._ended(part, "failed", f"ended at its limit of {limit:.0f} seconds", limit, log)
            except BaseException:  # an interrupt
                _end_group(process)
                raise
            finally:
                self._running.discard(process)
        seconds = time.monotonic() - begun
        told = [line for line in read_lines(self.results) if line["kind"] == "part" and line["part"] == part.name]
        if told:
            self.say(f"{part.name}: {told[-1]['status']}, {seconds:.0f} s" + _because(told[-1]["reason"]))
            if told[-1]["status"] != "ok":
                self._write(kind="log", part=part.name, output=_end_of(log))
            return bool(told[-1]["status"] == "ok")
        return self._ended(part, "failed", f"ended with status {code} and said nothing", seconds, log)

    def _ended(self, part: Part, status: str, reason: str, seconds: float, log: Path | None = None) -> bool:
        said = "" if log is None else _end_of(log)
        self._write(kind="part", part=part.name, status=status, reason=reason, output=said)
        self.say(f"{part.name}: {status}, {seconds:.0f} s{_because(reason)}")
        return False

    def _write(self, **facts: object) -> None:
        handle = os.open(self.results, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, (json.dumps(facts) + "\n").encode())
        finally:
            os.close(handle)

    def _environment(self, part: Part) -> dict[str, str]:
        changed = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        changed["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        changed.pop("TRITON_INTERPRET", None)
        if self.rehearsal and part.interpreted:
            changed["TRITON_INTERPRET"] = "1"
        return changed


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace").strip()[-REASON:]


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Return the results so far; a line that a killed process left unfinished is left out."""
    found = []
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
