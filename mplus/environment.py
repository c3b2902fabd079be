"""The environment of a run: versions, commit and device, for records and reports."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import mplus
from mplus.config import JsonValue

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


def run_info(**facts: JsonValue) -> dict[str, JsonValue]:
    """Return date, versions, commit, device and threads, and the ``facts`` of the caller (seeds, the model)."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "mplus": mplus.__version__,
        **_commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": _device(),
        "threads": torch.get_num_threads(),
        **facts,
    }


def load_average() -> float | None:
    """Return the processes that wanted to run in the last minute, these included; None where that is not known.

    More than there are cores disturb a timing.
    """
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _commit() -> dict[str, JsonValue]:
    """Return the commit of mplus itself, where it runs from a checkout, and whether files differ from it."""
    root = Path(mplus.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"commit": None}
    commit = _git(root, "rev-parse", "--short", "HEAD")
    return {"commit": commit, "modified": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            ["git", *arguments],  # noqa: S607 - found on PATH, as a person would start it
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine: the commit stays unknown, and the report says null
        return None
    return done.stdout.strip() or None


def _device() -> str:
    """Return the name of the GPU, or of the CPU with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU, {model or platform.machine()}, {os.cpu_count()} cores"
