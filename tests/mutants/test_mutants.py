"""The checks are sharp: they find every planted mistake, and nothing where none is planted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.mutants import gradients, kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at what mutants compute

MUTANTS = [*kernels.MUTANTS, *gradients.MUTANTS]
SUBJECTS = {mutant.subject.module: mutant.subject for mutant in MUTANTS}


@pytest.fixture
def altered(tmp_path, monkeypatch):
    """Imports a copy of a subject's module, with one text replaced."""

    def load(subject, old="", new=""):
        source = Path(importlib.util.find_spec(subject.module).origin).read_text(encoding="utf-8")
        assert not old or source.count(old) == 1, f"stands in {subject.module} {source.count(old)} times, not once"
        file = tmp_path / f"altered_{subject.module.rpartition('.')[2]}.py"
        file.write_text(source.replace(old, new) if old else source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_unaltered_copy_passes(name, altered):
    SUBJECTS[name].check_all(altered(SUBJECTS[name]))


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_planted_mistake_is_found(mutant, altered):
    module = altered(mutant.subject, mutant.old, mutant.new)
    with pytest.raises(AssertionError, match=r"error|written|zeros|not close"):
        mutant.subject.check_all(module, mutant.case)


def test_names_are_unique():
    assert len(set(map(str, MUTANTS))) == len(MUTANTS)
