"""Interleaved timing: who runs when, and what is made of the times. No test asserts a time."""

from __future__ import annotations

import pytest
import torch

from mplus import timing
from tests.helpers.docstrings import run_examples

CPU = torch.device("cpu")


def test_the_example_does_what_it_says():
    run_examples(timing.Arm)


def test_quantiles_and_ratios():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    times = {"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 1.0]}
    assert timing.ratio(times, "a", "b") == 3.0
    assert timing.ratio(times, "a", "c") is None


def test_every_arm_runs_in_every_round_and_first_in_some():
    seen = []

    def arm(name):
        prepare = lambda number: seen.append((number, "prepare"))  # noqa: E731
        return timing.Arm(name, lambda number: seen.append((number, name)), prepare)

    times = timing.in_rounds([arm(name) for name in "abc"], 3, CPU)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}
    runs = [entry for entry in seen if entry[1] != "prepare"]
    assert {number for number, _ in runs} == {0, 1, 2, 3}
    assert {runs[start][1] for start in range(0, 12, 3)} == set("abc")
    assert len(seen) == 24
