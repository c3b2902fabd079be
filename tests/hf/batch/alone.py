"""What a row of a batch reader has to be: the same text and memory through ``generate``, by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from tests.hf.references import TOLERANCE, error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.hf.batch.batch_reader import BatchReader
    from mplus.hf.batch.requests import Row
    from mplus.memory import Memory


@frozen
class Alone:
    """The greedy answer to one prompt: its tokens, and the logits ``[n, V]`` that each was chosen by."""

    tokens: list[int]
    logits: torch.Tensor

    def check(self, row: Row, place: int, logits: torch.Tensor) -> int:
        """Compare what a row found at one place of the answer; return the token it goes on with."""
        assert error(logits, self.logits[place]) < TOLERANCE, (place, row)
        assert int(logits.argmax()) == self.tokens[place], (place, row)
        return self.tokens[place]


def alone(model: Any, memory: Memory | None, ids: Sequence[int], new: int, **options: Any) -> Alone:
    """Generate ``new`` tokens greedily."""
    prompt = torch.tensor([list(ids)])
    given = {} if memory is None else {"memory": memory}
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, **given, **options,
    )  # fmt: skip
    return Alone(found.sequences[0, len(ids) :].tolist(), torch.cat(found.logits))


def run(reader: BatchReader, answers: dict[Row, Alone], places: dict[Row, int]) -> None:
    """Step all rows once, compare, and let those leave whose answer is at its end; ``places``: tokens they know."""
    rows = reader.rows
    logits = reader.step([answers[row].tokens[places[row] - 1] for row in rows])
    for row, own in zip(rows, logits, strict=True):
        answers[row].check(row, places[row], own)
        places[row] += 1
    reader.leave([row for row in rows if places[row] == len(answers[row].tokens)])


def join(reader: BatchReader, answers: dict[Row, Alone], places: dict[Row, int], asked: Any, own: list[Alone]) -> list:
    """Let rows join and compare the first token of each."""
    rows = reader.join(asked)
    for row, answer in zip(rows, own, strict=True):
        answers[row], places[row] = answer, 1
        answer.check(row, 0, row.logits)
    return rows
