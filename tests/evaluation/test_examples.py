"""The examples in docstrings of evaluations that need no decoder."""

from __future__ import annotations

import importlib

import pytest

from mplus.evaluation.generating import Generation, Scoring
from mplus.evaluation.options import RunOptions
from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.forgetting_curve import Curve
from mplus.evaluation.reports.report import Report
from mplus.evaluation.texts import Texts
from tests.evaluation.data import WordTokenizer
from tests.helpers.docstrings import run_examples


@pytest.mark.parametrize("thing", [Cell, Curve, Generation, Report, RunOptions, Scoring, Texts])
def test_it_says_what_it_does(thing):
    names = vars(importlib.import_module(thing.__module__))
    run_examples(thing, **{**names, "tokenizer": WordTokenizer()})
