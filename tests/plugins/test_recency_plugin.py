"""The example plug-in as its users meet it: installed from its folder, asked for by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "plugins" / "mplus-recency"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing but the plug-in installed in it."""
    target = tmp_path_factory.mktemp("site")
    command = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        f"--target={target}",
        str(FOLDER),
    ]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *command], check=True)
    return target


def python(site, *arguments, cwd=ROOT, **environment):
    """Run the interpreter with the plug-in's folder and mplus on the path; what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "MPLUS_PLUGINS"}
    paths = os.pathsep.join([str(site), str(ROOT)])
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def answer(site, code, **environment):
    return json.loads(python(site, "-c", code, **environment))


def test_found_by_name_without_being_imported(site):
    names, origin, imported = answer(
        site,
        "import json, sys\n"
        "from mplus.retrievers import RETRIEVERS\n"
        "names, origin = RETRIEVERS.names(), RETRIEVERS.origin('recency')\n"
        "print(json.dumps([names, origin, 'mplus_recency' in sys.modules]))",
    )
    assert {"linear", "random", "recency"} <= set(names)
    assert origin == "mplus-recency 0.1.0 (mplus_recency:RecencyRetriever)"
    assert not imported


def test_picks_the_newest(site):
    picked = answer(
        site,
        "import json, torch\n"
        "from mplus.retrievers import RETRIEVERS\n"
        "from mplus.retrievers.base import RetrieverShape\n"
        "from mplus.rows import MemoryRows\n"
        "from mplus.stores import STORES\n"
        "from mplus.stores.base import StoreLayout\n"
        "store = STORES.get('ram')(StoreLayout(layers=1, hidden_size=2))\n"
        "birth = torch.tensor([5, 9, 2, 9, 7, 8])\n"
        "ids = store.append(0, MemoryRows(torch.zeros(6, 2), birth, torch.zeros_like(birth))).tolist()\n"
        "retriever = RETRIEVERS.get('recency')(RetrieverShape(layers=1, hidden_size=2))\n"
        "queries, mask = torch.zeros(1, 3, 0), torch.ones(1, 3, dtype=torch.bool)\n"
        "[best] = retriever.select(0, queries, mask, [store], 5)\n"
        "print(json.dumps({'positions': [ids.index(i) for i in best.ids.tolist()], 'scores': best.scores.tolist(),\n"
        "    'dtype': str(best.scores.dtype), 'parameters': len(list(retriever.parameters()))}))",
    )
    assert picked["positions"] == [1, 3, 5, 4, 0]
    assert picked["scores"] == [9, 9, 8, 7, 5]
    assert picked["dtype"] == "torch.float32"
    assert picked["parameters"] == 0


def test_the_environment_can_leave_it_out(site):
    code = "import json; from mplus.retrievers import RETRIEVERS; print(json.dumps('recency' in RETRIEVERS.names()))"
    assert answer(site, code, MPLUS_PLUGINS="mplus_recency")
    assert not answer(site, code, MPLUS_PLUGINS="")
    assert not answer(site, code, MPLUS_PLUGINS="another-package")


@pytest.mark.nightly  # on every change test_docs_plugin_tutorial runs the same suite over the same plug-in
def test_its_own_tests_pass(site):
    printed = python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=FOLDER)
    assert " passed" in printed
    assert "skipped" not in printed
