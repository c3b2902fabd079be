"""A run on a GPU, rehearsed as a whole on the CPU, a process for each part."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.gpu.packages import ROOT
from benchmarks.gpu.plan import parts_of
from benchmarks.gpu.runner import read_lines


@pytest.mark.nightly
def test_everything_is_rehearsed(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = read_lines(tmp_path / "results.jsonl")
    ended = {line["part"]: (line["status"], line["reason"]) for line in lines if line["kind"] == "part"}
    assert ended == {part.name: ("ok", None) for part in parts_of(None, rehearsal=True)}, done.stdout[-3000:]
    assert done.returncode == 0
    assert "Nothing here was run on a GPU" in (tmp_path / "summary.md").read_text(encoding="utf-8")
