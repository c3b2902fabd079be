"""Memories of text: what they recall is read with a row's prompt."""

from __future__ import annotations

from typing import Any

import pytest

import mplus
from mplus.errors import NotSupported
from mplus.hf.batch.requests import RowRequest
from mplus.mechanisms import MECHANISMS
from tests.hf.batch.alone import Company, alone
from tests.mechanisms.text.decoders import CAT, KEY, ids_of, mamba, noted, with_notes, wrapped
from tests.mechanisms.text.phonebook import Triples

NEW = 5


@pytest.mark.parametrize("decoder", ["llama", "mamba"])
def test_rows_are_those_of_generate(decoder: str) -> None:
    model: Any = (with_notes() if decoder == "llama" else wrapped(mamba())).eval()
    memory, empty = noted(model, KEY, CAT), noted(model)
    asked = [
        RowRequest(one, ids_of(text), max_new_tokens=NEW)
        for one, text in ((memory, "Where is the key?"), (None, "The cat"), (empty, "A cat"), (memory, "The cat"))
    ]
    answers = [alone(model, one, NEW) for one in asked]
    company = Company(mplus.BatchReader(model))
    assert bool(company.reader.slow_because) == (decoder == "mamba")
    rows = company.join(asked[:2], answers[:2])
    assert {one.source for one in rows[0].sources[0]} <= {"s0", "s1"}
    company.step()
    company.join(asked[2:3], answers[2:3])
    joining = company.reader.begin(asked[3:])
    pieces = 1
    while not joining.advance(2):
        pieces += 1
    assert (pieces > 1) == (decoder == "llama")
    company.met(joining.rows[0], answers[3])
    company.finish()


def test_one_that_answers_calls_is_refused() -> None:
    MECHANISMS.register("triples", Triples)
    try:
        model = wrapped(None, "triples").eval()
    finally:
        MECHANISMS.unregister("triples")
    memory = noted(model, "Ada|office|room 12")
    refused, joined = mplus.BatchReader(model).join([(memory, ids_of("Who?")), (None, ids_of("Who?"))])
    assert isinstance(refused.error, NotSupported)
    assert "answers calls in the middle of a text" in str(refused.error)
    assert joined.error is None
