"""A page that builds a package, done as it says: files written, commands run in a new environment, output compared."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from tests.helpers.pages import BLOCK
from tools.package import link, required

ROOT = Path(__file__).parents[2]
INSTALLED = ["hatchling", "hypothesis", "pip", "pytest"]
"""What a page takes for granted beside mplus."""
COMMANDS = {"pip": "-m pip", "pytest": "-m pytest", "mplus": "-c 'from mplus.cli import main; main()'"}


def make_environment(folder: Path) -> dict[str, str]:
    """Return the variables of a new virtual environment with mplus and what it needs, and without plug-ins of ours."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    bin_folder = folder / "bin"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([bin_folder / "python", "-c", purelib], check=True, capture_output=True, text=True)
    site = Path(asked.stdout.strip())
    for package in required([*(distribution("mplus").requires or []), *INSTALLED]):
        link(package, site)
    (site / "mplus.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    for command, arguments in COMMANDS.items():
        script = bin_folder / command
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(bin_folder / "python"))} {arguments} "$@"\n')
        script.chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if name not in {"MPLUS_PLUGINS", "PYTHONPATH"}},
        "PATH": os.pathsep.join([str(bin_folder), os.environ.get("PATH", os.defpath)]),
        # What the package needs is there already; "0" is how pip spells that it must not be fetched again.
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def follow(page: str, work: Path, environment: dict[str, str]) -> int:
    """Do every block of ``page`` in the folder ``work``, and return how many commands were run."""
    work.mkdir()
    printed, commands = "", 0
    for block in BLOCK.finditer(page):
        if block["title"]:
            file = work / block["title"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"], encoding="utf-8")
        elif block["language"] == "bash":
            printed = _shell(block["text"], work, environment)
            commands += 1
        else:
            assert block["language"] == "text", f"a block without a title is neither a file nor a command: {block[0]}"
            _expect(block["text"], printed)
    return commands


def _shell(commands: str, folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        ["/bin/sh", "-e", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{commands}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _expect(lines: str, printed: str) -> None:
    """Each line is part of a later line of the output than the one before it."""
    rest = iter(printed.splitlines())
    for line in lines.splitlines():
        assert any(line in output for output in rest), f"{line!r} is not, or not in this place, in\n{printed}"
