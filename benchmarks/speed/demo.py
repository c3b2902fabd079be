"""Run the demo, record it, and quote it in the README.

``python -m benchmarks.speed.demo measure`` writes ``records/demo.json``; ``render`` writes what the README says of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from benchmarks.records import ROOT, record_path, write
from benchmarks.records import load as load_record
from mplus.environment import run_info

PAGE = ROOT / "README.md"
QUOTE = re.compile(r"(?<=<!-- demo -->\n).*?(?=<!-- /demo -->\n)", re.DOTALL)


def measure() -> dict[str, Any]:
    """What ``mplus demo-novel --json`` prints, with the circumstances of the run."""
    command = [sys.executable, "-m", "mplus.cli", "demo-novel", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    del report["saved"]["folder"]  # a temporary one
    return {**run_info(), **report}


def load() -> dict[str, Any]:
    """The record."""
    return load_record("speed", "demo")


def quote(record: dict[str, Any]) -> str:
    """The lines of the README."""
    layer, write, read, saved = record["layers"][0], record["write"], record["read"], record["saved"]
    rows = layer["short_term"] + layer["pending"] + layer["long_term"]
    told = list(zip(saved["here"]["tokens"], saved["in_new_process"]["tokens"], strict=True))
    return (
        f"> `mplus demo-novel`: a decoder of {record['parameters']:,} parameters reads all of "
        f"*{record['novel'].partition(' (')[0]}*, {record['tokens']:,} tokens.\n"
        f"> It writes {write['tokens_per_second']:,.0f} tokens/s into memory "
        f"(the decoder alone runs over them at {write['base_tokens_per_second']:,.0f}) and keeps\n"
        f"> {rows:,} rows per layer, {record['bytes'] / 2**20:.0f} MiB. With retrieval from all of it, "
        f"it reads {read['tokens_per_second']:,.0f} tokens/s\n"
        f"> (alone: {read['base_tokens_per_second']:,.0f}). Saved and loaded in a new process, it generates the same "
        f"{sum(a == b for a, b in told)} of {len(told)} tokens.\n"
        f"> — {record['device']}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}, "
        f"torch {record['torch']}; {record['seconds']:.0f} s for the whole demo.\n"
    )


def render(page: str, record: dict[str, Any]) -> str:
    """The README with the lines of this record."""
    return QUOTE.sub(lambda _: quote(record), page)


def main(command: str) -> None:
    """Run one of the two commands."""
    if command == "measure":
        write(record_path("speed", "demo"), measure())
    elif command == "render":
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), load()), encoding="utf-8")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
