"""The rules of the house: which room may import which, how long a file may be, what importing mplus costs."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mplus
from tools import house

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mplus"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 400
LONGEST_TEST = 500

# From the cellar to the roof. A module may import from its own floor and from those below.
FLOORS = [
    {"config", "errors", "plugins", "registry", "rows", "tokenizer"},
    {"download", "environment", "timing"},
    {"stores", "retrievers", "backends"},
    {"eviction"},
    {"memory"},
    {"mechanisms"},
    {"hf"},
    {"facts"},
    {"bench", "chat", "training", "evaluation", "serving", "interop", "testing"},
    {"cli"},
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
NAMES = {"mplus.mechanisms", "mplus.mechanisms.MECHANISMS"}
"""A registry is a list of names, which lies on the floor of ``registry``: what it names is imported when it is asked
for. Memories on disk find the class of their streams in it."""

# Third-party package -> the rooms or modules that may import it.
TENANTS = {
    "transformers": {"hf"},
    "peft": {"hf"},
    "accelerate": {"hf", "training"},
    "bitsandbytes": {"hf"},
    "entrypoints": {"plugins"},
    "pytest": {"testing"},
    "hypothesis": {"testing"},
    "typer": {"cli"},
    "faiss": {"retrievers"},
    "triton": {"backends"},
    "bm25s": {"evaluation"},
    "lm_eval": {"evaluation"},
    "matplotlib": {"evaluation"},
    "sentence_transformers": {"retrievers"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
    "ray": {"serving"},
}
INDEXED = {f"mplus.retrievers.{name}" for name in ("faiss_ivf", "ivf", "index_cache")}
"""Modules that are imported with faiss only."""
STATE = {"rows", "memory", "stores", "eviction", "retrievers", "backends", "mechanisms"}
"""Rooms that hold or compute the memory itself: tensors only."""


# What does not keep a rule yet. The lists only shrink: an entry that is no longer needed fails its test too.
NOT_YET = {
    "import circles": set(),
    "crowded folders": set(),
    "fields of M+'s state": {
        "mplus.memory.format.earlier",
    },
}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """``mplus.stores.ram`` -> ``stores``; the top of the package itself is the roof and has no room."""
    return ".".join(module.split(".")[1:2])


def imports(tree: ast.Module) -> set[str]:
    """Every module a source imports, wherever the statement stands, and for ``from`` also each name below it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rooms_imported(found: set[str]) -> set[str]:
    inside = {name for name in found if name.startswith("mplus.")}
    return {room_of(name) for name in inside - NAMES} & HEIGHT.keys()


@functools.cache
def modules() -> dict[str, house.Module]:
    return house.read_modules(ROOT)


@functools.cache
def imports_of_modules() -> dict[str, set[str]]:
    found = {name: imports(module.tree) for name, module in modules().items()}
    assert found.keys() == {name_of(file) for file in MODULES}
    return found


def in_subprocess(code: str) -> object:
    """Run code in a fresh interpreter; what it prints last, as JSON."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_module_has_a_floor():
    rooms = {room_of(name_of(file)) for file in MODULES} - {"", "__main__"}
    assert rooms <= HEIGHT.keys()


def test_the_page_for_contributors_shows_every_room_and_the_floors():
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    layout = re.findall(r"^      (.*?)  ", page.partition("\n## Layout\n")[2].partition("\n## ")[0], re.MULTILINE)
    shown = {name.strip("/").removesuffix(".py") for line in layout for name in line.split(", ")}
    rooms = {file.stem for file in PACKAGE.glob("[!_]*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert shown - {"data"} == rooms
    line = re.search(r"^Imports run one way: (.*?)\.\s", page, re.MULTILINE | re.DOTALL)[1]
    floors = [set(re.findall(r"`(\w+)`", floor)) for floor in reversed(line.split("→"))]
    assert floors == [floor & rooms for floor in FLOORS]


def test_imports_run_downhill():
    uphill = {
        name: {other for other in rooms_imported(found) if HEIGHT[other] > HEIGHT[room_of(name)]}
        for name, found in imports_of_modules().items()
        if room_of(name) not in {"", "__main__"}  # the roof: sees everything, lazily
    }
    assert not {name: sorted(rooms) for name, rooms in uphill.items() if rooms}, "these import from floors above"


def test_the_downhill_rule_sees_every_kind_of_import():
    for line in (
        "import mplus.hf",
        "from mplus import hf",
        "from mplus.hf.wrapper import wrap",
        "def f():\n    from mplus.hf import wrap",
        "if TYPE_CHECKING:\n    import mplus.hf.wrapper as w",
    ):
        assert rooms_imported(imports(ast.parse(line))) == {"hf"}, line


def check_shrinks(rule: str, found: set[str]) -> None:
    """What breaks a rule is what ``NOT_YET`` lists, no more and no less."""
    assert found <= NOT_YET[rule], f"new to the list of {rule}: {sorted(found - NOT_YET[rule])}"
    done = NOT_YET[rule] - found
    assert not done, f"take off NOT_YET, as it keeps the rule on {rule} now: {sorted(done)}"


def test_no_module_is_in_an_import_circle():
    """Imports in functions and under ``TYPE_CHECKING`` count, but for annotations with a type that mplus exports."""
    circles = house.circles(modules())
    check_shrinks("import circles", {name for circle in circles for name in circle})


def test_no_folder_holds_more_than_fits_on_a_screen():
    check_shrinks("crowded folders", set(house.crowded_folders(ROOT)))


def test_only_mechanisms_know_what_the_state_of_one_is_made_of():
    """No attribute, keyword, parameter or string outside ``mechanisms/`` is a field of M+'s state."""
    check_shrinks("fields of M+'s state", set(house.state_users(modules())))


def test_docstrings_begin_with_a_verb_or_name_the_thing():
    """A function does something and a class is something: "What ...", "Whether ..." or "See ..." says neither."""
    assert not house.no_verb(modules())


def test_third_party_packages_stay_in_their_rooms():
    for name, found in imports_of_modules().items():
        room, packages = room_of(name), {one.partition(".")[0] for one in found}
        foreign = {package for package in packages if room not in TENANTS.get(package, {room})}
        assert not foreign, f"{name} may not import {sorted(foreign)}"
        assert room not in STATE or "numpy" not in packages, f"{name}: memory is made of tensors"


def test_only_the_plugins_module_looks_for_entry_points():
    imported = imports_of_modules().items()
    assert not {name for name, found in imported if any(one.endswith(".entry_points") for one in found)}


@pytest.mark.parametrize(
    ("folder", "longest"),
    [(folder, LONGEST_FILE) for folder in ("mplus", "plugins", "benchmarks", "examples", "tools")]
    + [("tests", LONGEST_TEST)],
)
def test_files_are_short(folder, longest):
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in (ROOT / folder).rglob("*.py")
    }
    too_long = {file: length for file, length in lengths.items() if length > longest}
    assert not too_long, f"split what is longer than {longest} lines"


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert mplus.__version__ == project["version"]


def test_import_brings_in_nothing_heavy():
    loaded = in_subprocess("import json, sys, mplus; print(json.dumps(sorted(sys.modules)))")
    assert not {"transformers", "peft", "accelerate", "faiss", "triton", "typer", "rich", "matplotlib"} & set(loaded)


def test_everything_below_hf_works_without_transformers():
    below = [name_of(file) for file in MODULES if HEIGHT.get(room_of(name_of(file)), 99) < HEIGHT["hf"]]
    below = [name for name in below if not name.startswith("mplus.backends.triton.kernels")]  # import triton at once
    below = [name for name in below if name not in INDEXED]
    loaded = in_subprocess(
        "import importlib, json, sys\n"
        f"for name in {below!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert not {"transformers", "peft", "faiss", "triton", "pytest", "hypothesis"} & set(loaded)


def test_importing_a_registry_imports_no_implementation():
    loaded = in_subprocess(
        "import json, sys, mplus.stores, mplus.eviction, mplus.retrievers, mplus.backends, mplus.mechanisms\n"
        "import mplus.training.data, mplus.training.objectives\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert "torch" not in loaded
    assert [name for name in loaded if name.startswith("mplus.stores")] == ["mplus.stores"]


COST = """
import json, os, sys
def cost(name):
    before = set(sys.modules)
    __import__(name)
    new = [sys.modules[module] for module in set(sys.modules) - before if module in sys.modules]
    files = {getattr(module, "__file__", None) for module in new}
    size = sum(os.path.getsize(file) for file in files if file and file.endswith('.py') and os.path.isfile(file))
    return {"modules": len(new), "bytes": size}
print(json.dumps({name: cost(name) for name in ("torch", "mplus")}))
"""


def test_import_costs_at_most_a_fifth_of_importing_torch():
    """Torch and then mplus in one process: modules and source they add."""
    run = in_subprocess(COST)
    for measure in ("modules", "bytes"):
        assert run["mplus"][measure] <= 0.2 * run["torch"][measure], measure
