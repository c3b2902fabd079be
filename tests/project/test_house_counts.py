"""The counts of ``tools/house.py``, on a package small enough to be counted by hand."""

from __future__ import annotations

import json
import sys

import pytest

from tools import house

SOURCES = {
    "mplus/__init__.py": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from mplus.memory.memory import Memory
""",
    "mplus/memory/__init__.py": "",
    "mplus/memory/memory.py": '''
class Memory:
    """What is kept."""

    def save(self) -> None:
        """Save everything."""
        from mplus.memory import files  # a circle, though this is imported late
        files.save(self)

    def __eq__(self, other: object) -> bool:
        return self is other
''',
    "mplus/memory/files.py": """
import mplus
from typing import Any

Plain = dict[str, Any]

def save(memory: mplus.Memory) -> None:
    write(memory)

def write(memory: Any) -> Plain:
    return {}
""",
    "mplus/memory/engine.py": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from mplus.memory.memory import Memory
    from mplus.memory.stream import Stream

class Engine:
    memory: Memory
    stream: Stream
""",
    "mplus/memory/stream.py": """
from mplus.memory.engine import Engine

def newest(engine: Engine) -> object:
    return [1]

def fields(stm, rows):
    return stm
""",
    "mplus/mechanisms.py": """
def state(stream):
    return stream.stm, stream.pending
""",
    "mplus/training.py": """
from mplus.memory.stream import newest

def losses(memory):
    \"\"\"How well it reads.\"\"\"
    first = memory.stream.pending
    # twice, as a loss
    second = newest(memory)
    third = newest(memory)
    return first, second, third

def early(tensors):
    return tensors["stm"]
""",
    **{f"tests/test_{number}.py": "" for number in range(house.MOST_FILES + 1)},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name, source in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder


@pytest.fixture(scope="module")
def modules(root):
    return house.read_modules(root)


def test_a_circle_is_found_wherever_its_imports_stand(modules):
    assert house.circles(modules) == [
        ["mplus.memory.engine", "mplus.memory.stream"],  # one import is for annotations, of no public type
        ["mplus.memory.files", "mplus.memory.memory"],  # one import is in a function, one through the top
    ]


def test_an_annotation_of_a_public_type_is_no_import(modules):
    assert house.import_graph(modules)["mplus.memory.engine"] == {"mplus.memory.stream"}


def test_folders_are_counted_by_their_own_files(root):
    assert house.crowded_folders(root) == {"tests": house.MOST_FILES + 1}


def test_state_is_found_as_attribute_parameter_and_string_outside_mechanisms(modules):
    assert house.state_users(modules) == ["mplus.memory.stream", "mplus.training"]
    assert house.state_users(modules, strict=False) == ["mplus.training"]


def test_functions_called_once_are_found_by_name(modules):
    assert house.called_once(modules) == [
        "mplus.mechanisms.state",
        "mplus.memory.files.save",
        "mplus.memory.files.write",
        "mplus.memory.stream.fields",
        "mplus.training.early",
    ]


def test_any_is_counted_behind_its_alias_too(modules):
    assert house.untyped(modules) == [
        "mplus.memory.files:5 Plain",
        "mplus.memory.files:10 Plain",
        "mplus.memory.files:10 Any",
        "mplus.memory.stream:4 object",
    ]


def test_docstrings_that_begin_with_no_verb(modules):
    assert house.no_verb(modules) == ["mplus.memory.memory:2 Memory", "mplus.training:4 losses"]


def test_the_table_has_every_number(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house", "--root", str(root), "--json"])
    house.main()
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["files"] == sum(name.startswith("mplus/") for name in SOURCES)
    assert numbers["import circles"] == 2
    assert numbers["modules in import circles"] == 4
    assert numbers["functions"] == 9
    assert numbers["most lines of a file"] == 13
    assert numbers["files with one importer"] == 3  # engine, files, memory: stream has two
    assert 0 < numbers["comments per 100 lines"] < 10


def test_what_is_counted_can_be_listed(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house", "--root", str(root), "--list", "no_verb"])
    house.main()
    assert capsys.readouterr().out.splitlines() == ["mplus.memory.memory:2 Memory", "mplus.training:4 losses"]


def test_everything_can_be_listed_at_once(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house", "--root", str(root), "--list"])
    house.main()
    lines = capsys.readouterr().out.splitlines()
    names = [line.removeprefix("== ") for line in lines if line.startswith("== ")]
    assert names == [*house.LISTS, "crowded_folders"]
    assert lines[lines.index("== files") + 1] == "13 mplus/training.py"
    assert lines[lines.index("== functions") + 1] == "7 mplus.training:4 losses"
    assert lines[lines.index("== comments") + 1] == "1 mplus/memory/memory.py"
    assert lines[-1] == f"{house.MOST_FILES + 1} tests"


def test_one_write_is_counted_and_its_files_are_listed(monkeypatch, capsys):
    calls = house.write_calls()
    monkeypatch.setattr(house, "write_calls", lambda: calls)
    numbers = house.write_path()
    assert numbers["calls in one write"] > numbers["functions in one write"] > numbers["files in one write"] > 5
    monkeypatch.setattr(sys, "argv", ["house", "--write-path", "--list"])
    house.main()
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "== write_trip"
    files = [line for line in lines if not line.startswith(" ")]
    assert len(files) == numbers["files in one write"]
    assert len(lines) - len(files) == numbers["functions in one write"]
    assert "memory/directory/journal.py" in files
