"""Pure Python packages that mplus needs, carried along to a machine that has PyTorch and no network.

``python -m benchmarks.gpu --pack`` puts them into the folder ``.gpu`` of the tree, with the commit that they come from.
A run finds them there, behind everything that is installed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / ".gpu"
PURE = ("cattrs", "entrypoints")
"""Dependencies of mplus that an environment for PyTorch does not have."""
NEEDED = (
    *("accelerate", "attrs", "cattrs", "entrypoints", "filelock", "numpy", "peft", "rich", "safetensors", "torch"),
    *("transformers", "triton", "typer"),
)


def use_packages(carried: Path = CARRIED) -> None:
    """Let this process import what was carried along, where the environment does not have it."""
    folder = str(carried / "packages")
    if Path(folder).is_dir() and folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()


def missing() -> list[str]:
    """Return the packages that a run needs and cannot import."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def pack(carried: Path = CARRIED) -> list[str]:
    """Copy the pure packages and the name of the commit into the tree; return the names of what was copied.

    Raises:
        PackageNotFoundError: one of them is not installed here.
    """
    folder = carried / "packages"
    shutil.rmtree(folder, ignore_errors=True)
    copied = []
    for name in PURE:
        files = distribution(name).files or ()
        if not files:
            raise PackageNotFoundError(name)
        for file in files:
            source = Path(str(file.locate()))
            if source.suffix != ".pyc" and ".." not in file.parts and source.is_file():
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        copied.append(name)
    (carried / "commit.json").write_text(json.dumps(commit()) + "\n", encoding="utf-8")
    return copied


def commit(carried: Path = CARRIED) -> dict[str, object]:
    """Return the commit of this tree and whether files differ from it; of a copy without git what ``pack`` wrote."""
    if (ROOT / ".git").exists():
        head = _git("rev-parse", "--short", "HEAD") or None
        return {"commit": head, "modified": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    file = carried / "commit.json"
    found: dict[str, object] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"commit": None}
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
