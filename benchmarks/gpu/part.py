"""The process of one part: ``python -m benchmarks.gpu.part NAME RESULTS [--device cpu] [--tiny] [--few]``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.packages import use_packages
from benchmarks.gpu.plan import PARTS


def main(arguments: list[str]) -> int:
    """Run one part; what it raises is written as its failure. Returns 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[part.name for part in PARTS])
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args(arguments)
    use_packages()
    import torch

    from benchmarks.gpu.session import FAILED, OK, Session

    session = Session(
        options.name,
        options.results,
        torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device),
        tiny=options.tiny,
        few=options.few,
        interpret=os.environ.get("TRITON_INTERPRET") == "1",
    )
    try:
        run_part(session)
    except BaseException as problem:  # noqa: BLE001 - also an exit that something calls is a failure
        session.write("part", status=FAILED, reason=f"{type(problem).__name__}: {problem}"[:2000])
        traceback.print_exc()
        return 1
    reason = f"{len(session.failed)} gates failed, {session.failed[0]} first" if session.failed else None
    session.write("part", status=FAILED if session.failed else OK, reason=reason)
    return 1 if session.failed else 0


def run_part(session: object) -> None:
    """Call the function of a session's part."""
    (part,) = (one for one in PARTS if one.name == session.part)  # type: ignore[attr-defined]
    module, _, function = part.target.partition(":")
    getattr(import_module(f"benchmarks.gpu.{module}"), function)(session)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
