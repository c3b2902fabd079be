"""The plug-in tutorial, done as it says: files written, commands run, output compared."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plugins.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture
def environment(tmp_path):
    """Environment variables of a new virtual environment that sees mplus and what mplus needs, but not our plug-ins."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    bin_folder = folder / "bin"
    site = subprocess.run(
        [bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "outer.pth").write_text("\n".join([*sorted(outer), str(ROOT)]) + "\n", encoding="utf-8")
    commands = {"pip": "-m pip", "pytest": "-m pytest", "mplus": "-c 'from mplus.cli import main; main()'"}
    for command, arguments in commands.items():
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


def test_every_block_does_what_the_page_says(environment, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    blocks = list(BLOCK.finditer(PAGE.read_text(encoding="utf-8")))
    assert {block["language"] for block in blocks} == {"python", "toml", "bash", "text"}
    printed = ""
    commands = 0
    for block in blocks:
        if block["title"]:
            file = work / block["title"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"], encoding="utf-8")
        elif block["language"] == "bash":
            printed = shell(block["text"], work, environment)
            commands += 1
        else:
            assert block["language"] == "text", f"a block without a title is neither a file nor a command: {block[0]}"
            expect(block["text"], printed)
    assert commands >= 5


def shell(commands, folder, environment):
    result = subprocess.run(
        ["/bin/sh", "-e", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{commands}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def expect(lines, printed):
    """Each line is part of a later line of the output than the one before it."""
    rest = iter(printed.splitlines())
    for line in lines.splitlines():
        assert any(line in output for output in rest), f"{line!r} is not, or not in this place, in\n{printed}"
