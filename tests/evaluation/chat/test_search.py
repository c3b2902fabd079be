"""Search recall beside what a plain look at the searches says."""

from __future__ import annotations

import pytest

from mplus.errors import InputError
from mplus.evaluation.chat.search import SearchResult, search_recall
from mplus.evaluation.execution.base import Due
from mplus.evaluation.tasks.base import Episode, Passage, Question
from mplus.memory.sources.found import FoundText
from tests.evaluation.chat.small import execution, notes


class Sources:
    """A memory that finds what it is given."""

    def __init__(self, *found):
        self.found = [FoundText(float(len(found) - place), name, None, None) for place, name in enumerate(found)]

    def search(self, text, k, row):
        return self.found[:k]


def due(*needs):
    passages = tuple(Passage(text="x", source=f"s{number}") for number in range(4))
    question = Question(prompt="?", answers=("a",), needs=needs, after=3)
    return Due(Episode(number=0, passages=passages, questions=(question,)), 0, 0, 0)


def test_ranks_and_what_is_rejected():
    result = SearchResult()
    result.search(Sources("s1", "s0"), due(0))
    result.search(Sources("s3", "s1", "s2"), due(1, 2))
    result.search(Sources("s1"), due(1, 2))
    result.search(Sources(), due(3))
    result.search(Sources("s1"), due())
    result.search(Sources(), due())
    assert result.ranks == [2, 3, None, None]
    facts = result.plain()
    assert facts["recall_at"] == {"1": 0.0, "2": 0.25, "4": 0.5, "8": 0.5}
    assert (facts["questions"], facts["untold"]) == (4, 2)
    assert (facts["told_rejected"], facts["untold_rejected"]) == (0.25, 0.5)
    # Best scores: told 2, 3, 1 and none, untold 1 and none; of eight pairs 4 + 2/2 and 1 + ... equal ones count half.
    pairs = [(told > untold) + (told == untold) / 2 for told in (2, 3, 1, 0) for untold in (1, 0)]
    assert facts["auroc_of_score"] == pytest.approx(sum(pairs) / 8)


def test_it_searches_every_memory():
    found = search_recall([("kv", execution(task=notes(untold=1)))], "tiny")
    facts = found["memories"]["kv"]
    assert (facts["questions"], facts["untold"]) == (3, 1)
    assert facts["recall_at"]["8"] >= facts["recall_at"]["1"] > 0
    assert found["circumstances"]["model"] == "tiny"
    with pytest.raises(InputError, match="at least one memory"):
        search_recall([])
