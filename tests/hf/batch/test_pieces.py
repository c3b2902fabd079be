"""A long prompt is read in pieces, between which other rows step, and what it retrieves is settled by all of it."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

import mplus
from mplus.errors import InputError
from mplus.hf.batch.requests import RowRequest
from tests.hf.batch.alone import Company, alone
from tests.hf.batch.readers import memories, wrapped
from tests.memory.tiny import ids

pytestmark = pytest.mark.two_computations

NEW = 6


@pytest.mark.parametrize("mechanism", ["mplus", "memoryllm", "kv", None])
def test_other_rows_step_between_the_pieces(mechanism: str | None) -> None:
    model = wrapped(mechanism or "mplus")
    memory, other = (None, None) if mechanism is None else memories(model)[1:]
    asked = [
        RowRequest(one, ids(tokens, seed=tokens), max_new_tokens=NEW) for one, tokens in ((other, 4), (memory, 50))
    ]
    answers = [alone(model, one, NEW) for one in asked]
    company = Company(mplus.BatchReader(model))
    company.join(asked[:1], answers[:1])
    joining, pieces = company.reader.begin([RowRequest(memory, ids(50, seed=50), max_new_tokens=NEW, copies=2)]), 0
    with pytest.raises(InputError, match="has not joined yet"):
        _ = joining.rows[0].logits
    while not joining.advance(13):
        if memory is not None:
            memory.write(ids(20, seed=pieces), source="while it is read")
        pieces += 1
        company.step()
        assert not {*joining.rows} & {*company.reader.rows}
    assert pieces >= 2
    for row in joining.rows:
        company.met(row, answers[1])
    company.finish()


def test_short_prompts_fill_a_piece_together() -> None:
    model = wrapped("mplus")
    memory, reader = memories(model)[1], mplus.BatchReader(model)
    joining = reader.begin([(memory, ids(6)), (None, ids(3)), (memory, ids(30)), (memory, ids(2))])
    assert not joining.advance(9)
    assert set(reader.rows) == set(joining.rows[:2])
    assert not joining.advance(10)
    assert len(reader.rows) == 2
    assert not joining.advance(), "the rest of the prompt that was begun"
    assert set(reader.rows) == set(joining.rows[:3])
    assert joining.advance()
    assert joining.done
    assert set(reader.rows) == set(joining.rows)


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "mplus-prompt"}


def test_a_joining_that_is_dropped_leaves_nothing_behind() -> None:
    model = wrapped("mplus")
    memory, reader = memories(model)[1], mplus.BatchReader(model)
    joining: Any = reader.begin([(memory, ids(40))])
    assert not joining.advance(10)
    (thread,) = threads()
    del joining
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert not reader.rows


def test_a_prompt_that_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("mplus")
    memory, reader = memories(model)[1], mplus.BatchReader(model)
    joining = reader.begin([(memory, ids(40)), (memory, [10**6] * 40), (memory, ids(4))])
    assert not joining.advance(10)

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(model.model.layers[-1].mlp, "forward", failing)
    while joining.rows[0].error is None:
        assert not joining.advance(10)
    assert "no more memory" in str(joining.rows[0].error)
    monkeypatch.undo()
    assert not joining.advance(10)
    assert isinstance(joining.rows[1].error, InputError)
    assert joining.advance(10)
    assert reader.rows == joining.rows[2:]
    assert not threads()
