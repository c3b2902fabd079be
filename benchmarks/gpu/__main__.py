"""Everything of mplus that is made for a GPU, tried and measured on one: ``python -m benchmarks.gpu`` or ``make gpu``.

    python -m benchmarks.gpu                   # nine minutes on the first NVIDIA GPU
    python -m benchmarks.gpu --rehearse        # the same on a CPU, with the smallest sizes and interpreted kernels
    python -m benchmarks.gpu --pack            # before: what a machine without a network needs, into .gpu
    python -m benchmarks.gpu --take FILE       # after: the results of a run on another machine, into the tree

A run writes ``results.jsonl``, a line for each gate, part and record as they come, and ``summary.md``. From a run on a
GPU the records go into ``benchmarks/gpu/records``, and the order of backends that ``auto`` takes there into
``mplus/backends/measured.json``. Each part is a process with a limit of its own: one that fails or hangs says so in the
results, and the others run. The exit status is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.packages import CARRIED, ROOT, missing, pack, use_packages
from benchmarks.gpu.plan import parts_of
from benchmarks.gpu.runner import AT_A_TIME, Runner, read_lines
from benchmarks.gpu.summary import summary


def main(arguments: list[str]) -> int:
    """Run, rehearse, pack or take."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (default: 9)")
    parser.add_argument("--only", help="names of parts, with commas between them")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny; says nothing about a GPU")
    parser.add_argument("--few", action="store_true", help="a rehearsal of some cases of each kind")
    parser.add_argument("--pack", action="store_true", help=f"copy pure packages to {CARRIED.name}/ and end")
    parser.add_argument("--take", type=Path, metavar="FILE", help="put the results of a run into the tree and end")
    options = parser.parse_args(arguments)
    if options.pack:
        print(f"{CARRIED.name}/packages: {', '.join(pack())}")
        return 0
    use_packages()
    if options.take is not None:
        return take(options.take)
    lacking = missing()
    if lacking:
        print(
            f"missing packages: {', '.join(lacking)}. Where there is a network: pip install {' '.join(lacking)}; else "
            "python -m benchmarks.gpu --pack where mplus is installed, and copy the tree again",
            file=sys.stderr,
        )
        return 2
    if not options.rehearse and not has_gpu():
        print("torch sees no NVIDIA GPU: --rehearse tries everything on the CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    results.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that its parts end with it
    names = None if options.only is None else ["device", *options.only.split(",")]
    with tempfile.TemporaryDirectory() as logs:
        runner = Runner(
            results,
            Path(logs),
            60 * options.minutes,
            ["--device", "cpu", "--tiny", *(["--few"] if options.few else [])] if options.rehearse else [],
            rehearsal=options.rehearse,
            at_a_time=2 if options.rehearse else AT_A_TIME,
        )
        went_well = runner.run(parts_of(names, rehearsal=options.rehearse))
    said = summary(read_lines(results))
    (options.out / "summary.md").write_text(said, encoding="utf-8")
    print(said)
    if not options.rehearse:
        take(results)
    return 0 if went_well else 1


def has_gpu() -> bool:
    """Return whether torch sees an NVIDIA GPU; asked in this process without making a context there."""
    import torch

    return torch.version.cuda is not None and torch.cuda.device_count() > 0


def take(results: Path) -> int:
    """Put records and the order of backends into the tree, from a run on a GPU. Returns 1 for a rehearsal's results."""
    from benchmarks.gpu.taking import put_into_tree

    lines = read_lines(results)
    written = put_into_tree(lines)
    for file in written:
        print(f"written: {file}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
