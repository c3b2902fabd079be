"""`make test-cpus` holds every library to one level of instructions, and fails where a test does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tools import cpus

TESTS = """
import os, pytest
@pytest.mark.two_computations
def test_marked():
    assert (os.environ.get("ATEN_CPU_CAPABILITY"), os.environ["OMP_NUM_THREADS"]) != ("avx2", "2")
def test_not_marked():
    assert False
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = two_computations\naddopts = -p no:cacheprovider\n")
    monkeypatch.setattr(cpus, "ROOT", tmp_path)


@pytest.mark.usefixtures("repository")
def test_the_table_says_where_a_test_failed(capfd):
    assert cpus.main(["--level", "avx2"]) == 1
    table = capfd.readouterr().out.partition("outcome")[2].splitlines()[1:]
    assert [line.split()[:2] + line.split()[3:4] for line in table] == [
        ["avx2", "1", "passed"],
        ["avx2", "2", "FAILED"],
    ]


@pytest.mark.usefixtures("repository")
def test_levels_where_nothing_fails(capfd):
    assert cpus.main(["--level", "generic", "--threads", "2"]) == 0
    assert "1 passed, 1 deselected" in capfd.readouterr().out


def test_each_level_sets_all_variables_and_best_none(monkeypatch):
    generic, avx2, best = (cpus.VARIABLES[level].keys() for level in ("generic", "avx2", "best"))
    assert generic == avx2
    assert not best
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert not generic & cpus.environment("best", 1).keys()


PROBE = """
import json, torch
import faiss
print(json.dumps([torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), faiss.SIMDConfig.get_level_name()]))
"""


def test_the_libraries_do_as_they_are_told():
    environment = {**os.environ, **cpus.environment("generic", 1)}
    printed = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout) == ["DEFAULT", 1, "NONE"]
