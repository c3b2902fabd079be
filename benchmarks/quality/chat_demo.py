"""What a memory is worth to a chat model that people have: runs ``mplus demo`` and records what it prints.

python -m benchmarks.quality.chat_demo    # needs SmolLM2 (mplus get smollm2); writes records/chat-demo.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.records import ROOT, record_path, write
from mplus.environment import load_average, run_info


def measure(*options: str) -> dict[str, Any]:
    """Return the run metadata, the load of the machine before and after, and the report of ``mplus demo --json``."""
    loads = [load_average()]
    command = [sys.executable, "-m", "mplus.cli", "demo", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return {**run_info(), "load_average": [*loads, load_average()], **json.loads(done.stdout)}


if __name__ == "__main__":
    write(record_path("quality", "chat-demo"), measure(*sys.argv[1:]))
