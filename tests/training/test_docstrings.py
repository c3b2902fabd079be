"""The examples in docstrings of what training offers do what they say."""

from __future__ import annotations

from typing import Any

import pytest

from mplus.timing import Arm
from mplus.training.batch import BatchSource
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.objectives.base import Objective
from tests.helpers.docstrings import run_examples


@pytest.mark.parametrize("thing", [Arm, BatchSource, CounterRNG, Objective])
def test_the_example_does_what_it_says(thing: Any) -> None:
    run_examples(thing)
