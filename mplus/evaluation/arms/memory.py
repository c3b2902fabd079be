"""Arms that read the same memory with the same weights, and differ in what is brought back from long-term memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mplus.evaluation.arms.base import Bench, Due, Reply, TextArm
from mplus.evaluation.generating import answers
from mplus.evaluation.oracle import OracleMechanism
from mplus.hf.reading.override import mechanism_for_reads, reading_as
from mplus.mechanisms.base import MemoryMechanism
from mplus.memory.memory import Memory
from mplus.retrievers.base import Retriever


class MemoryArm(TextArm):
    """Reads memory with one retriever, or with none.

    Args:
        bench: what all arms share.
        name: the arm's name.
        retriever: stands in for the decoder's own; None: the decoder's own.
        retrieved_tokens: K0; None: as configured; 0: short-term memory only (MemoryLLM).
        oracle: bring back the rows that were written from the passages with the answer.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        *,
        retriever: Retriever | None = None,
        retrieved_tokens: int | None = None,
        oracle: bool = False,
    ) -> None:
        super().__init__(bench)
        self.name = name  # type: ignore[misc]
        self.retriever = retriever
        self.retrieved_tokens = retrieved_tokens
        self.oracle = oracle

    def reply(self, due: Sequence[Due], memory: Memory) -> list[Reply | None]:
        found: list[Reply | None] = []
        size = self.bench.generation.batch
        for start in range(0, len(due), size):
            found += self._batch(due[start : start + size], memory)
        return found

    def _batch(self, due: Sequence[Due], memory: Memory) -> list[Reply | None]:
        bench, generation = self.bench, self.bench.generation
        streams = memory.select([one.row for one in due])
        prompts = [generation.prompt(bench.texts.ids(one.question.prompt), memory=True) for one in due]
        make: Callable[[Any, Any, Any], MemoryMechanism] | None = None
        if self.oracle:
            make = partial(OracleMechanism, wanted=[one.sources() for one in due])
        plain = self.retriever is None and self.retrieved_tokens is None and make is None
        if plain:
            return self._replies(streams, prompts)
        with reading_as(bench.model, retriever=self.retriever, retrieved_tokens=self.retrieved_tokens, make=make):
            return self._replies(streams, prompts)

    def _replies(self, streams: Memory, prompts: Sequence[Sequence[int]]) -> list[Reply | None]:
        bench = self.bench
        mechanism = mechanism_for_reads(bench.model.mplus_engine)
        made = answers(bench.model, bench.tokenizer, prompts, bench.generation, streams)
        replies: list[Reply | None] = []
        for row, (view, prompt, one) in enumerate(zip(streams.snapshot(), prompts, made, strict=True)):
            rows = mechanism.prefix_rows(view)
            replies.append(Reply(one.text, self._state_bytes(streams, row), rows + len(prompt), one))
        return replies

    def _state_bytes(self, streams: Memory, row: int) -> int:
        view, layers = streams.snapshot()[row], range(streams.stores[row].layout.layers)
        if self.retrieved_tokens == 0:  # what it never reads, it would not keep
            mechanism = self.bench.model.mplus_engine.mechanism
            return sum(0 if rows is None else rows.nbytes for rows in (mechanism.standing(view, n) for n in layers))
        lists = view.state.row_lists().values()
        return sum(rows.nbytes for parts in lists for rows in parts) + streams.stores[row].nbytes
