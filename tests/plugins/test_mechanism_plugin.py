"""A memory on disk whose mechanism comes from a package, in processes with and without that package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "examples" / "write_a_mechanism.py").read_text(encoding="utf-8")
CLASS = EXAMPLE[: EXAMPLE.index("\n\nMECHANISMS.register(")]
WITH_TENSOR = """

from attrs import define
from mplus.mechanisms import StreamState


@define(frozen=True, eq=False, kw_only=True)
class Last(StreamState):
    last: torch.Tensor

    def tensors(self):
        return {"last": self.last}

    def forgotten(self, number):
        return evolve(self, last=self.last[:0].clone())


class Diary(TokenMemory):
    name, State = "diary", Last

    def new_state(self, layout, columns=None):
        return Last(last=torch.empty(0, dtype=torch.int64))

    def absorb(self, state, update, source, context):
        done = super().absorb(state, update, source, context)
        return evolve(done, state=evolve(done.state, last=context.ids.clone()))
"""
MAKE = """
import sys
import torch, mplus
from mplus.hf.pretrained.shipped import load_decoder
for name in ("tokens", "diary"):
    sizes = {"chunk_tokens": 16, "min_chunk_tokens": 4, "adapters": None, "memory_rows": "hidden"}
    model = mplus.wrap(load_decoder(), {"mechanism": name, **sizes})
    with mplus.Memory.open(f"{name}-live", model) as memory:
        for number, source in enumerate(("diary of Ada", "a book")):
            memory.write(torch.arange(16) + 3 + 16 * number, source=source)
        memory.save(f"{name}-saved")
"""
WITHOUT = """
import json
from typer.testing import CliRunner
import mplus
from mplus.cli import app
from mplus.hf.pretrained.shipped import load_decoder
from mplus.mechanisms import MECHANISMS

def run(*arguments):
    done = CliRunner().invoke(app, ["memory", *arguments])
    return done.exit_code, done.output + (done.stderr if done.exit_code else "")

found = {"known": "tokens" in MECHANISMS.names()}
model = mplus.wrap(load_decoder(), {"mechanism": "memoryllm", "chunk_tokens": 16, "adapters": None})
for name in ("tokens-saved", "tokens-live", "diary-saved", "diary-live"):
    found[name] = {command: run(command, name) for command in ("show", "verify", "sources")}
    try:
        mplus.Memory.load(name, model) if name.endswith("saved") else mplus.Memory.open(name, model)
    except mplus.errors.MPlusError as error:
        found[name]["load"] = [type(error).__name__, str(error)]
    found[name]["forget"] = run("forget", name, "diary of Ada")
    found[name]["verify again"] = run("verify", name)
print(json.dumps(found))
"""
AGAIN = """
import json
import mplus
from mplus.hf.pretrained.shipped import load_decoder
sizes = {"chunk_tokens": 16, "min_chunk_tokens": 4, "adapters": None, "memory_rows": "hidden"}
model = mplus.wrap(load_decoder(), {"mechanism": "tokens", **sizes})
saved = mplus.Memory.load("tokens-saved", model)
with mplus.Memory.open("tokens-live", model) as live:
    print(json.dumps([[source.name for source in memory.sources()] for memory in (saved, live)]))
"""


PROCESSES = """
import os, sys
import transformers.models.llama.modeling_llama  # what takes seconds; of mplus each process imports its own

site, *programs = sys.argv[1:]
assert not [name for name in sys.modules if name.partition(".")[0] == "mplus"]
for program in programs:
    installed, code = program[0] == "+", program[1:]
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        sys.path[:0] = [site] * installed
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status == 0, status
"""
"""Run programs one after another, each in a process of its own, with (+) or without (-) the package on its path."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a package of two mechanisms in ``site``."""
    info = tmp_path / "site" / "mplus_tokens-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mplus-tokens\nVersion: 0.1.0\n")
    lines = ["[mplus.mechanisms]", "tokens = mplus_tokens:TokenMemory", "diary = mplus_tokens:Diary"]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "site" / "mplus_tokens.py").write_text(CLASS + WITH_TENSOR)
    return tmp_path


def run(folder: Path, *programs: str) -> list[str]:
    """Run programs in ``folder`` as ``PROCESSES`` does; return the lines that they print."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, str(folder / "site"), *programs],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_without_the_package_all_works_that_needs_no_decoder(folder: Path) -> None:
    *_, without, again = run(folder, f"+{MAKE}", f"-{WITHOUT}", f"+{AGAIN}")
    found: dict[str, Any] = json.loads(without)
    assert found.pop("known") is False
    for name, results in found.items():
        mechanism = name.partition("-")[0]
        for command in ("show", "verify", "sources", "verify again"):
            assert results[command][0] == 0, (name, command, results[command][1])
        assert "diary of Ada" in results["sources"][1]
        kind, message = results["load"]
        assert kind == "MemoryMismatchError"
        assert f"the mechanism {mechanism!r} is not installed" in message
        assert "entry-point group 'mplus.mechanisms'" in message
        status, said = results["forget"]
        if mechanism == "tokens":
            assert status == 0, said
        else:  # only the mechanism knows what its tensors hold of a source
            assert status == 2
            assert "tensors last hold of a source: install its package" in " ".join(said.split())
    assert json.loads(again) == [["a book"], ["a book"]]
