"""What reading a whole novel costs: runs ``mplus demo-novel`` and records what it prints.

python -m benchmarks.speed.demo    # writes records/demo.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.records import ROOT, record_path, write
from mplus.environment import run_info


def measure() -> dict[str, Any]:
    """Return the run metadata and the report of ``mplus demo-novel --json``."""
    command = [sys.executable, "-m", "mplus.cli", "demo-novel", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    del report["saved"]["folder"]  # a temporary one
    return {**run_info(), **report}


if __name__ == "__main__":
    write(record_path("speed", "demo"), measure())
