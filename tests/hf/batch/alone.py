"""What a row of a batch reader has to be: the same text and memory through ``generate``, by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field

from tests.hf.references import TOLERANCE, error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.hf.batch.batch_reader import BatchReader
    from mplus.hf.batch.requests import Row, RowRequest


@define(frozen=True, eq=False)
class Alone:
    """The greedy answer to one prompt: its tokens, the logits ``[n, V]`` that each was chosen by, and the sources."""

    tokens: list[int]
    logits: torch.Tensor
    sources: Sequence[Any] = ()

    def check(self, place: int, logits: torch.Tensor, tolerance: float) -> None:
        """Compare what a row found at one place of the answer."""
        assert error(logits, self.logits[place]) < tolerance, place
        assert int(logits.argmax()) == self.tokens[place], place


def alone(model: Any, request: RowRequest, new: int) -> Alone:
    """Generate ``new`` tokens greedily, as a request asks."""
    prompt = torch.tensor([request.ids])
    given: dict[str, Any] = {}
    if request.memory is not None:
        given = {"memory": request.memory, "output_sources": True}
        for name in ("min_score", "query_tokens", "retrieval_query", "retrieve_every"):
            given |= {name: getattr(request, name)} if getattr(request, name) is not None else {}
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, **given,
    )  # fmt: skip
    sources = getattr(found, "memory_sources", [()])[0]
    return Alone(found.sequences[0, len(request.ids) :].tolist(), torch.cat(found.logits), sources)


@define(eq=False)
class Company:
    """A batch reader, and of each of its rows what it says alone and how many tokens of that it has said."""

    reader: BatchReader
    tolerance: float = TOLERANCE
    answers: dict[Row, Alone] = field(factory=dict)
    said: dict[Row, int] = field(factory=dict)

    def join(self, asked: Sequence[RowRequest], answers: Sequence[Alone]) -> list[Row]:
        """Let rows join, one for each request, and compare their first token and their sources."""
        rows = self.reader.join(asked)
        for row, answer in zip(rows, answers, strict=True):
            self.met(row, answer)
        return rows

    def met(self, row: Row, answer: Alone) -> None:
        """Take note of a row that has joined."""
        assert row.error is None, row.error
        answer.check(0, row.logits, self.tolerance)
        if row.request.retrieve_every is None:  # else the reports are of different times
            assert [[(s.source, s.age) for s in layer] for layer in row.sources if layer] == [
                [(s.source, s.age) for s in layer] for layer in answer.sources if layer
            ]
        self.answers[row], self.said[row] = answer, 1

    def step(self) -> None:
        """Step all rows once and compare; those that have said all leave."""
        self.leave([row for row in self.reader.rows if self.said[row] >= len(self.answers[row].tokens)])
        rows = self.reader.rows
        if not rows:
            return
        logits = self.reader.step([self.answers[row].tokens[self.said[row] - 1] for row in rows])
        for row, own in zip(rows, logits, strict=True):
            self.answers[row].check(self.said[row], own, self.tolerance)
            self.said[row] += 1

    def leave(self, rows: list[Row]) -> None:
        """Let rows go."""
        self.reader.leave(rows)
        for row in rows:
            del self.answers[row], self.said[row]

    def finish(self) -> None:
        """Step until all rows have said all."""
        while self.reader.rows:
            self.step()
