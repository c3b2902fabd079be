"""What a mechanism returns from ``write`` is checked before anything of a memory changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.errors import MechanismError, NonFiniteError
from mplus.memory.writing.update import Update
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable


WRONG: dict[str, tuple[Callable[[Update], Any], str]] = {
    "no update": (lambda made: list(made.hidden), "an Update with hidden states or projections"),
    "nothing": (lambda made: Update(()), "an Update with hidden states or projections"),
    "a foreign layer": (
        lambda made: Update((*made.hidden, made.hidden[0])),
        "3 layers of its layout, got those of 4",
    ),
    "a layer too few": (lambda made: Update(made.hidden[:-1]), "the 3 layers of its layout, got those of 2"),
    "wide rows": (
        lambda made: Update(tuple(torch.cat([one, one], 2) for one in made.hidden)),
        r"floating \[2, k, \d+\]",
    ),
    "one stream": (lambda made: Update(tuple(one[:1] for one in made.hidden)), r"layer 0 as floating \[2, k, "),
    "uneven": (lambda made: Update((*made.hidden[:-1], made.hidden[-1][:, 1:])), r"equally many rows .* got \[3, 4\]"),
    "whole numbers": (lambda made: Update(tuple(one.long() for one in made.hidden)), "as floating .* got torch.int64"),
    "only projections": (
        lambda made: Update((), tuple(one[..., :1] for one in made.hidden)),
        "hidden states of rows, as these memories keep them",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_update_is_named_and_nothing_is_written(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = WRONG[what]
    model = tiny.variant("paper")
    mechanism, memory = model.mplus_engine.mechanism, model.new_memory(2, seed=1, memory_rows="hidden")
    memory.write([tiny.ids(2 * tiny.CHUNK)] * 2, "a")
    before, own = tiny.content(memory), type(mechanism).write
    monkeypatch.setattr(type(mechanism), "write", lambda self, *what: change(own(self, *what)))
    with pytest.raises(MechanismError, match=f"^the mechanism 'mplus': write must return .*{message}"):
        memory.write([tiny.ids(tiny.CHUNK, 5)] * 2, "b")
    tiny.assert_content(memory, before)


def test_what_is_not_finite_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.variant("paper")
    mechanism, memory = model.mplus_engine.mechanism, model.new_memory(seed=1)
    before, own = tiny.content(memory), type(mechanism).write

    def broken(self: Any, *what: Any) -> Update:
        made = own(self, *what)
        return Update((*made.hidden[:-1], made.hidden[-1] * float("nan")))

    monkeypatch.setattr(type(mechanism), "write", broken)
    with pytest.raises(NonFiniteError, match="in layer 2 for a chunk of 16 tokens"):
        memory.write(tiny.ids(tiny.CHUNK), "b")
    tiny.assert_content(memory, before)
