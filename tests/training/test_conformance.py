"""The objectives and data sources of mplus are what their interfaces promise."""

from __future__ import annotations

from typing import ClassVar

import pytest

from mplus.config import structure
from mplus.testing import suites as suites_of
from mplus.testing.objectives import ObjectiveConformance
from mplus.testing.sources import STREAMS, SourceConformance
from mplus.training.batch import BatchSource
from mplus.training.data import SOURCES
from mplus.training.objectives import OBJECTIVES
from mplus.training.objectives.base import Objective
from tests.helpers.docstrings import run_examples
from tests.helpers.letters import Letters, library


@pytest.mark.parametrize("interface", [BatchSource, Objective])
def test_the_example_of_an_interface_does_what_it_says(interface):
    run_examples(interface)


globals().update(suites_of(ObjectiveConformance, OBJECTIVES))
globals()["TestWindowObjectiveConformance"].trains_additions = False

FILLER = "It was a day. The rain fell! Who came by? Nobody did. "


class TestDocuments(SourceConformance):
    implementation = SOURCES.get("documents")
    requests = ({"chunks": 1}, {"chunks": 3}, {"chunks": 1, "repeat": True}, {"chunks": 0})
    options: ClassVar = {"consecutive": True}

    def make(self, numbers, seed):
        options: ClassVar = {"paths": "unused", "chunk_tokens": (10, 20), "target_tokens": (8, 30), "window_tokens": 40}
        books = library(400, 90, 3, 0, 700, 150, 55, 1200, 31, 260)
        made = structure(self.implementation.Options, {**options, **self.options})
        return self.implementation(made, tokenizer=Letters(), numbers=numbers, seed=seed, documents=books)


class TestSampledDocuments(TestDocuments):
    options: ClassVar = {"consecutive": False, "streams": STREAMS, "query_tokens": 4}


class TestRandomQueries(TestDocuments):
    options: ClassVar = {"query_tokens": "random"}


class Generated(SourceConformance):
    kind = ""
    filler = ""

    @pytest.fixture(autouse=True)
    def text(self, tmp_path_factory):
        file = tmp_path_factory.getbasetemp() / "filler.txt"
        file.write_text(FILLER * 30, encoding="utf-8")
        self.filler = str(file)

    def make(self, numbers, seed):
        implementation = SOURCES.get(self.kind)
        given = {"filler": {"paths": self.filler}, "chunk_tokens": (200, 220), "window_tokens": 400}
        options = structure(implementation.Options, given)
        return implementation(options, tokenizer=Letters(), numbers=numbers, seed=seed)


class TestCopying(Generated):
    kind = "copying"
    implementation = SOURCES.get("copying")


class TestQuestions(Generated):
    kind = "questions"
    implementation = SOURCES.get("questions")


class TestNotes(Generated):
    kind = "notes"
    implementation = SOURCES.get("notes")


class TestRecall(SourceConformance):
    implementation = SOURCES.get("recall")
    options: ClassVar = {"ages": "mixed", "unknown": 0.3, "window_tokens": 64}

    def make(self, numbers, seed):
        options = structure(self.implementation.Options, self.options)
        return self.implementation(options, tokenizer=None, numbers=numbers, seed=seed)


class TestRecallNamesToo(TestRecall):
    options: ClassVar = {"ages": "all", "episode": 6, "name_labels": True, "held_out": True}


def test_every_source_is_held_to_the_suite():
    suites = [cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, SourceConformance)]
    held = {cls.implementation for cls in suites if hasattr(cls, "implementation")}
    assert {SOURCES.get(name) for name in SOURCES.names()} <= held
