"""Run the tests in their long modes and commit a record of the run under ``benchmarks/nightly``.

``python tools/nightly.py`` runs all of them, ``python tools/nightly.py tests/memory/directory`` some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from mplus.environment import run_info

ROOT = Path(__file__).resolve().parent.parent
SLOW = 1.0
"""Seconds from which a test is named in the record."""
INTERPRETED = ("tests/interpreted", "tests/mutants")
"""Folders whose tests interpret kernels, in a process of their own."""


def main(arguments: list[str]) -> int:
    """Run pytest with ``arguments`` added, write and commit the record, return pytest's exit status.

    Where ``arguments`` name files or folders of tests, only these run, and the record says so.
    """
    started = datetime.now(UTC)
    clock = time.monotonic()
    paths = [argument for argument in arguments if (ROOT / argument.split("::")[0]).exists()]
    runs = [run(arguments)]
    if not paths:
        runs.append(run([*INTERPRETED, *arguments], TRITON_INTERPRET="1"))
    status = max(status for status, _ in runs)
    outcome = {
        "tests": sum(found["tests"] for _, found in runs),
        **{kind: sorted(name for _, found in runs for name in found[kind]) for kind in ("skipped", "failed", "errors")},
        **{
            kind: {name: value for _, found in runs for name, value in found[kind].items()}
            for kind in ("counts", "slow_seconds")
        },
    }
    record = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock),
        "only": paths,
        "pytest_status": status,
        **outcome,
        **run_info(
            commit=git("rev-parse", "HEAD"),
            modified=bool(git("status", "--porcelain", "--untracked-files=no")),
        ),
    }
    file = ROOT / "benchmarks" / "nightly" / f"{started:%Y-%m-%dT%H%M%SZ}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    git("add", "--", str(file))
    git("commit", "--quiet", "-m", f"Record of the nightly tests of {started:%Y-%m-%d}", "--", str(file))
    print(f"{file.relative_to(ROOT)}: {record['tests']} tests, exit status {status}")
    return status


def run(arguments: list[str], **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit status and outcome of pytest with ``arguments``, in the long modes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        workers = ["-n", "2", "--dist", "worksteal"]
        reporting = ["-o", "junit_family=xunit1", f"--junitxml={report}"]  # the family that has properties of tests
        command = [sys.executable, "-m", "pytest", *workers, *reporting, *arguments]
        settings = {**os.environ, "MPLUS_NIGHTLY": "1", **environment}
        status = subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode
        return status, summarize(report)


def summarize(report: Path) -> dict[str, Any]:
    """Counts, the names of tests that did not pass and slow tests from pytest's JUnit report."""
    root = ET.parse(report).getroot() if report.exists() else None  # noqa: S314 - pytest wrote it a moment ago
    suite = None if root is None else root.find("testsuite")
    cases = [] if suite is None else suite.findall("testcase")
    name = {case: f"{case.get('classname')}.{case.get('name')}" for case in cases}
    seconds = {name[case]: round(float(case.get("time", 0)), 1) for case in cases}
    return {
        "tests": len(cases),
        "skipped": sorted(name[case] for case in cases if case.find("skipped") is not None),
        "failed": sorted(name[case] for case in cases if case.find("failure") is not None),
        "errors": sorted(name[case] for case in cases if case.find("error") is not None),
        "counts": {name[case]: found for case in cases if (found := counts(case))},
        "slow_seconds": {test: spent for test, spent in sorted(seconds.items()) if spent >= SLOW},
    }


def counts(case: ET.Element) -> dict[str, int]:
    """What a test says it made so many of (``record_property``): kills, mutants, steps."""
    found = {item.get("name", ""): item.get("value", "") for item in case.iter("property")}
    return {name: int(value) for name, value in found.items() if value.isdecimal()}


def git(*arguments: str) -> str:
    """Output of a git command in the repository; raises CalledProcessError when it fails."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
