"""The checks of the kernels are sharp: they find every planted mistake, and nothing where none is planted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mplus.backends.triton import kernels
from tests.interpreted.checks import CHECKS
from tests.mutants.planted import MUTANTS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at what mutants compute

FOLDER = Path(kernels.__file__).parent


@pytest.fixture
def altered(tmp_path, monkeypatch):
    """Imports a copy of a kernel's module with one text replaced."""

    def load(kernel, old="", new=""):
        source = (FOLDER / f"{kernel}.py").read_text(encoding="utf-8")
        assert not old or source.count(old) == 1, f"stands in {kernel}.py {source.count(old)} times, not once"
        file = tmp_path / f"altered_{kernel}.py"
        file.write_text(source.replace(old, new) if old else source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("kernel", CHECKS)
def test_an_unaltered_copy_passes(kernel, altered):
    check_all(kernel, altered(kernel))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kernel}: {mutant.name}")
def test_a_planted_mistake_is_found(mutant, altered):
    module = altered(mutant.kernel, mutant.old, mutant.new)
    with pytest.raises(AssertionError, match=r"error|written|zeros"):
        check_all(mutant.kernel, module, mutant.case)


def check_all(kernel, module, only=None):
    """Check every case of a kernel, or only one."""
    cases, check = CHECKS[kernel]
    for case in cases if only is None else [only]:
        check(module, case)


def test_names_are_unique():
    assert len({(mutant.kernel, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)
