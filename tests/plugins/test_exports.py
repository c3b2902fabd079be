"""Everything that a plug-in author needs of a kind is imported from the package of that kind, which stays light."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ("backends", "eviction", "mechanisms", "retrievers", "stores", "training.data", "training.objectives")


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_of_a_kind_is_there(kind):
    package = importlib.import_module(f"mplus.{kind}")
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match=f"module 'mplus.{kind}' has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("kind", KINDS)
def test_type_checkers_see_the_names_that_are_there(kind):
    """The names are listed three times: for type checkers, for ``import *``, and for the import itself."""
    package = importlib.import_module(f"mplus.{kind}")
    tree = ast.parse(Path(inspect.getfile(package)).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    registry, *names = package.__all__
    assert registry.isupper()
    assert set(names) == seen.keys()
    for name, module in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_the_packages_import_no_torch():
    code = f"import sys; import {', '.join(f'mplus.{kind}' for kind in KINDS)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_module_hides_a_name(kind):
    """An import of a module puts it into its package, over a name that is the same."""
    package = importlib.import_module(f"mplus.{kind}")
    assert not set(package.__all__) & {module.name for module in pkgutil.iter_modules(package.__path__)}
