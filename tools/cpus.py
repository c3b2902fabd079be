"""Run the tests that compare two computations as processors of other kinds would.

``python tools/cpus.py`` runs those marked ``two_computations`` at every level of instructions, with one thread and with
two; ``python tools/cpus.py --level avx2 --threads 1 tests/hf`` some of them.

Sums round differently with the width of vectors and the number of threads. A test that holds on one processor only is
wrong, and shows here before it does on somebody's machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLES: dict[str, dict[str, str]] = {
    "generic": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "FAISS_OPT_LEVEL": "generic",
        "FAISS_SIMD_LEVEL": "NONE",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "FAISS_OPT_LEVEL": "AVX2",
        "FAISS_SIMD_LEVEL": "AVX2",
    },
    "best": {},
}
"""Level -> variables by which the libraries are told to use no more: torch, oneDNN, MKL (which takes the first on Intel
only), OpenBLAS, faiss (before and since 1.13). Each is read when its library is loaded."""
THREADS = (1, 2)


def main(arguments: list[str] | None = None) -> int:
    """Run all that was asked for, print a table, and return 1 if a test failed anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", action="append", choices=VARIABLES, help="of instructions; default: all")
    parser.add_argument("--threads", action="append", type=int, choices=THREADS, help="default: 1 and 2")
    chosen, rest = parser.parse_known_args(arguments)
    table = []
    for level in chosen.level or VARIABLES:
        for threads in chosen.threads or THREADS:
            print(f"== {level}, {threads} threads", flush=True)
            begun = time.monotonic()
            status = run(level, threads, rest)
            table.append((level, threads, status, time.monotonic() - begun))
    print(f"\n{'level':<8} {'threads':>7} {'seconds':>8}  outcome")
    for level, threads, status, seconds in table:
        outcome = "passed" if status == 0 else f"FAILED (pytest ended with {status})"
        print(f"{level:<8} {threads:>7} {seconds:>8.0f}  {outcome}")
    return int(any(status for _, _, status, _ in table))


def run(level: str, threads: int, arguments: list[str]) -> int:
    """Exit status of pytest at one level with so many threads; ``arguments`` are pytest's."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "two_computations", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(level, threads), check=False).returncode


def environment(level: str, threads: int) -> dict[str, str]:
    """The environment of this process with every library held to ``level``, whatever it was held to before."""
    named = {name for variables in VARIABLES.values() for name in variables}
    kept = {name: value for name, value in os.environ.items() if name not in named}
    count = str(threads)
    return {**kept, **VARIABLES[level], "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


if __name__ == "__main__":
    sys.exit(main())
