"""The nightly command runs the tests in their long modes and commits what came out, also when a test fails."""

from __future__ import annotations

import json
import subprocess

import pytest

from tools import nightly


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for command in (["init", "--quiet"], ["config", "user.name", "t"], ["config", "user.email", "t@example.org"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_long_modes(): assert os.environ['MPLUS_NIGHTLY'] == '1'\n"
        "def test_wrong(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_left_out(): pass\n"
        "def test_counting(record_property): record_property('kills', 7)\n"
    )
    for name in nightly.INTERPRETED:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / f"test_{folder.name}.py").write_text(
            "import os\n"
            "def test_interpreting():\n"
            "    assert (os.environ['TRITON_INTERPRET'], os.environ['MPLUS_NIGHTLY']) == ('1', '1')\n"
        )
    (tmp_path / "pytest.ini").write_text("[pytest]\nnorecursedirs = tests\nfilterwarnings = error\n")
    (tmp_path / "unrelated.txt").write_text("committed")
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "--quiet", "-m", "start"], cwd=tmp_path, check=True)
    monkeypatch.setattr(nightly, "ROOT", tmp_path)
    return tmp_path


def test_record_is_written_and_committed(repository):
    start = nightly.git("rev-parse", "HEAD")
    (repository / "unrelated.txt").write_text("changed")
    assert nightly.main(["-p", "no:cacheprovider", "-n", "0"]) == 1
    [file] = (repository / "benchmarks" / "nightly").glob("*.json")
    record = json.loads(file.read_text())
    assert record["tests"] == 6
    assert record["only"] == []
    assert record["counts"] == {"test_it.test_counting": {"kills": 7}}
    assert record["failed"] == ["test_it.test_wrong"]
    assert record["skipped"] == ["test_it.test_left_out"]
    assert record["errors"] == []
    assert record["commit"] == start
    assert record["modified"] is True
    assert record["pytest_status"] == 1
    assert {"device", "python", "torch", "transformers", "threads"} <= record.keys()
    assert nightly.git("show", "--name-only", "--format=", "HEAD") == f"benchmarks/nightly/{file.name}"
    assert nightly.git("status", "--porcelain", "--untracked-files=no") == "M unrelated.txt"


def test_some_of_the_tests(repository):
    assert nightly.main(["test_it.py::test_counting", "-p", "no:cacheprovider", "-n", "0"]) == 0
    [file] = (repository / "benchmarks" / "nightly").glob("*.json")
    record = json.loads(file.read_text())
    assert (record["tests"], record["only"]) == (1, ["test_it.py::test_counting"])
