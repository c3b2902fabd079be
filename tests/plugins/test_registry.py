"""The registry: lazy, strict about duplicates and base classes, helpful about names, safe between threads."""

from __future__ import annotations

import sys
import threading
import tomllib
from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from mplus.errors import ConfigError, DuplicateNameError, MissingDependencyError, PluginError, UnknownNameError
from mplus.plugins import Plugin
from mplus.registry import EXTRAS, FileRegistry, Registry, RegistryEntry


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    def area(self) -> float:
        return 1.0


class Circle(Shape):
    def area(self) -> float:
        return 3.14


class Unfinished(Shape):
    pass


def plugin(name, load, distribution="other-shapes", error=None):
    """A plug-in whose loading is a function; counts as discovered, never as imported."""
    made = Plugin("test.shapes", name, distribution, "2.1", f"{distribution.replace('-', '_')}:Thing", error)
    object.__setattr__(made, "_entry", type("Entry", (), {"load": staticmethod(load)}))
    return made


OTHERS = "; packages announce others in the entry-point group 'test.shapes'."


def shapes(*plugins, **options):
    options.setdefault("builtin", {"square": f"{__name__}:Square"})
    return Registry(
        "shape", group="test.shapes", base=f"{__name__}:Shape", discover=lambda group: list(plugins), **options
    )


def fail(error):
    def load():
        raise error

    return load


def test_builtin_is_imported_when_asked_for(tmp_path, monkeypatch):
    (tmp_path / "lazily_imported.py").write_text("class Triangle:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry(
        "shape",
        group="test.shapes",
        base="lazily_imported:Triangle",
        builtin={"triangle": "lazily_imported:Triangle"},
        discover=lambda group: [],
    )
    assert registry.names() == ["triangle"]
    assert "lazily_imported" not in sys.modules
    assert registry.get("triangle").__name__ == "Triangle"
    del sys.modules["lazily_imported"]


def test_same_class_every_time():
    registry = shapes()
    assert registry.get("square") is Square
    assert registry.get("square") is Square


def test_plugins_are_looked_up_once_and_only_when_needed():
    asked = []

    def discover(group):
        asked.append(group)
        return [plugin("circle", lambda: Circle)]

    registry = Registry("shape", group="test.shapes", base=f"{__name__}:Shape", discover=discover)
    assert asked == []
    assert registry.names() == ["circle"]
    assert registry.get("circle") is Circle
    assert asked == ["test.shapes"]


def test_unknown_name_suggests_and_lists():
    registry = shapes(plugin("circle", lambda: Circle))
    with pytest.raises(UnknownNameError) as caught:
        registry.get("squire")
    assert str(caught.value) == "no shape is called 'squire'; did you mean 'square'? Available: circle, square" + OTHERS


def test_unknown_name_without_a_near_one():
    with pytest.raises(UnknownNameError) as caught:
        shapes().get("zzz")
    assert str(caught.value) == "no shape is called 'zzz'. Available: square" + OTHERS


@pytest.mark.parametrize("name", [None, 3, ["square"], ""])
def test_something_that_is_no_name_is_unknown(name):
    with pytest.raises(UnknownNameError, match="Available: square"):
        shapes().get(name)


def test_empty_registry_says_so():
    with pytest.raises(UnknownNameError, match="Available: none; packages"):
        shapes(builtin={}).get("square")


def test_unknown_name_tells_that_plugins_are_limited(monkeypatch):
    monkeypatch.setenv("MPLUS_PLUGINS", "Some_Package, other")
    with pytest.raises(UnknownNameError, match="MPLUS_PLUGINS limits plug-ins to: other, some-package"):
        shapes().get("circle")
    monkeypatch.setenv("MPLUS_PLUGINS", "")
    with pytest.raises(UnknownNameError, match="MPLUS_PLUGINS limits plug-ins to: none"):
        shapes().get("circle")


def test_registered_class_and_string():
    registry = shapes()
    registry.register("circle", Circle)
    registry.register("again", f"{__name__}:Circle")
    assert registry.get("circle") is Circle
    assert registry.get("again") is Circle
    assert registry.names() == ["again", "circle", "square"]


def test_registering_the_same_again_changes_nothing():
    registry = shapes()
    registry.register("circle", Circle)
    registry.register("circle", Circle)
    registry.register("square", f"{__name__}:Square")
    assert registry.get("circle") is Circle


def test_registering_another_under_a_taken_name_is_refused_with_both_origins():
    registry = shapes()
    with pytest.raises(DuplicateNameError) as caught:
        registry.register("square", Circle)
    message = str(caught.value)
    assert f"mplus ({__name__}:Square)" in message
    assert "test_registry.py:" in message
    assert f"{Circle.__module__}:Circle" in message
    assert registry.get("square") is Square


def test_registering_under_the_name_of_a_plugin_is_refused():
    registry = shapes(plugin("circle", lambda: Circle))
    with pytest.raises(DuplicateNameError, match=r"other-shapes 2\.1 \(other_shapes:Thing\) and by registered at"):
        registry.register("circle", Square)
    assert registry.get("circle") is Circle


@pytest.mark.parametrize("name", ["", "two words", " circle", None, 7])
def test_bad_names_are_refused(name):
    with pytest.raises(ConfigError, match="must be a non-empty string without spaces, got"):
        shapes().register(name, Circle)


@pytest.mark.parametrize("target", ["module_only", ":Circle", "module:", ""])
def test_bad_targets_are_refused(target):
    with pytest.raises(ConfigError, match="as a class or 'module:attribute', got"):
        shapes().register("circle", target)


@pytest.mark.parametrize("thing", [dict, Circle(), None, 3])
def test_registering_something_else_is_refused(thing):
    registry = shapes()
    with pytest.raises(PluginError, match=r"must be a subclass of \S+:Shape, got"):
        registry.register("circle", thing)
    assert registry.names() == ["square"]


def test_reserved_names():
    registry = shapes(plugin("auto", lambda: Circle), reserved={"auto"})
    with pytest.raises(ConfigError, match="'auto' is reserved"):
        registry.register("auto", Circle)
    with pytest.raises(PluginError, match="'auto' is reserved"):
        registry.get("auto")


def test_unregister_takes_back_only_what_was_registered():
    registry = shapes()
    registry.register("circle", Circle)
    assert registry.get("circle") is Circle
    registry.unregister("circle")
    assert registry.names() == ["square"]
    with pytest.raises(UnknownNameError, match="'square' was registered by this program"):
        registry.unregister("square")
    assert registry.get("square") is Square


def test_plugin_and_builtin_of_one_name_fail_only_when_asked_for():
    registry = shapes(plugin("square", lambda: Circle), plugin("circle", lambda: Circle))
    assert registry.get("circle") is Circle
    assert registry.names() == ["circle", "square"]
    for ask in (registry.get, registry.origin):
        with pytest.raises(DuplicateNameError) as caught:
            ask("square")
        assert f"mplus ({__name__}:Square)" in str(caught.value)
        assert "other-shapes 2.1 (other_shapes:Thing)" in str(caught.value)


def test_two_plugins_of_one_name_fail_only_when_asked_for():
    registry = shapes(plugin("circle", lambda: Circle, "round-a"), plugin("circle", lambda: Circle, "round-b"))
    assert registry.get("square") is Square
    with pytest.raises(DuplicateNameError, match=r"round-a 2\.1 .* and by round-b 2\.1"):
        registry.get("circle")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("no luck"), "RuntimeError: no luck"),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"), "No module named 'scipy'"),
        (ImportError("cannot import"), "ImportError: cannot import"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_broken_plugin_raises_only_when_asked_for(error, words):
    registry = shapes(plugin("circle", fail(error)))
    assert registry.get("square") is Square
    with pytest.raises(PluginError) as caught:
        registry.get("circle")
    assert words in str(caught.value)
    assert "shape 'circle' of other-shapes 2.1" in str(caught.value)
    assert caught.value.__cause__ is error


def test_interrupt_while_loading_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        shapes(plugin("circle", fail(KeyboardInterrupt()))).get("circle")


@pytest.mark.parametrize("module", ["faiss", "faiss.swigfaiss", "triton", "triton.language"])
def test_missing_optional_package_names_its_extra(module):
    extra = module.partition(".")[0]
    registry = shapes(plugin("circle", fail(ModuleNotFoundError(f"No module named {module!r}", name=module))))
    with pytest.raises(MissingDependencyError) as caught:
        registry.get("circle")
    assert f"pip install 'mplus[{extra}]'" in str(caught.value)
    assert caught.value.name == extra


def test_every_extra_named_in_an_error_exists():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


def test_plugin_of_another_interface_is_refused():
    with pytest.raises(PluginError, match=r"must be a subclass of \S+:Shape, got builtins:dict"):
        shapes(plugin("circle", lambda: dict)).get("circle")


def test_unfinished_class_is_refused_with_what_it_lacks():
    with pytest.raises(PluginError, match="leaves abstract methods undefined: area"):
        shapes(plugin("circle", lambda: Unfinished)).get("circle")


def test_entries_list_everything_with_errors():
    registry = shapes(
        plugin("bad", fail(RuntimeError("no luck"))),
        plugin("circle", lambda: Circle),
        plugin("square", lambda: Circle),
        plugin("line", lambda: Circle, error="the line is wrong"),
    )
    entries = registry.entries()
    origin = "other-shapes 2.1 (other_shapes:Thing)"
    assert [(entry.name, entry.origin) for entry in entries] == [
        ("bad", origin),
        ("circle", origin),
        ("line", origin),
        ("square", f"mplus ({__name__}:Square)"),
        ("square", origin),
    ]
    errors = [entry.error for entry in entries]
    assert "RuntimeError: no luck" in errors[0]
    assert entries[1] == RegistryEntry("circle", origin, None)
    assert "the line is wrong" in errors[2]
    assert errors[3] == errors[4]
    assert "is claimed by" in errors[3]


def test_origin():
    registry = shapes(plugin("circle", lambda: Circle))
    assert registry.origin("square") == f"mplus ({__name__}:Square)"
    assert registry.origin("circle") == "other-shapes 2.1 (other_shapes:Thing)"
    with pytest.raises(UnknownNameError):
        registry.origin("line")


def test_threads_get_one_class():
    made = []
    together = threading.Barrier(8)

    def load():
        made.append(type("Round", (Circle,), {}))
        return made[-1]

    registry = shapes(plugin("circle", load))
    found = []

    def ask():
        together.wait()
        found.append(registry.get("circle"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_module_may_register_while_another_thread_imports_it(tmp_path, monkeypatch):
    """Were the lock held during imports, these two threads would wait for each other."""
    (tmp_path / "registers_itself.py").write_text(
        "import registry_under_test as r\n"
        "r.importing.set()\n"
        "r.asked.wait(10)\n"
        "class Triangle(r.Shape):\n"
        "    def area(self):\n"
        "        return 0.5\n"
        "r.registry.register('second', Triangle)\n"
    )
    shared = type(sys)("registry_under_test")
    shared.Shape = Shape
    shared.registry = shapes(builtin={"first": "registers_itself:Triangle"})
    shared.importing, shared.asked = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "registry_under_test", shared)
    monkeypatch.syspath_prepend(tmp_path)
    found = []

    def importer():
        __import__("registers_itself")

    def asker():
        shared.importing.wait(10)
        threading.Timer(0.2, shared.asked.set).start()
        found.append(shared.registry.get("first"))

    threads = [threading.Thread(target=importer, daemon=True), threading.Thread(target=asker, daemon=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert found[0] is shared.registry.get("second")
    del sys.modules["registers_itself"]


def test_files_are_named_too(tmp_path):
    (tmp_path / "a.toml").touch()
    (tmp_path / "b.toml").touch()
    missing, text = tmp_path / "gone.toml", str(tmp_path / "a.toml")
    found = [plugin("b", lambda: tmp_path / "b.toml"), plugin("gone", lambda: missing), plugin("text", lambda: text)]
    registry = FileRegistry(
        "recipe", group="test.recipes", builtin={"a": tmp_path / "a.toml"}, discover=lambda group: found
    )
    assert registry.names() == ["a", "b", "gone", "text"]
    assert (registry.get("a"), registry.get("b")) == (tmp_path / "a.toml", tmp_path / "b.toml")
    assert registry.origin("a") == "mplus (a.toml)"
    with pytest.raises(
        PluginError, match=r"recipe 'gone' of other-shapes 2\.1 .* must be a file that exists, got '.*gone"
    ):
        registry.get("gone")
    with pytest.raises(
        PluginError, match=r"'text' of .* must be the pathlib\.Path of a file, got '.*a\.toml' of type str"
    ):
        registry.get("text")
    assert [entry.name for entry in registry.entries() if entry.error] == ["gone", "text"]
    with pytest.raises(PluginError, match="must be a file that exists"):
        registry.register("another", missing)
    registry.register("c", tmp_path / "b.toml")
    assert registry.get("c") == tmp_path / "b.toml"
