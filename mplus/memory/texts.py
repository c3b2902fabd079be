"""Texts: the ids of all chunks a stream was written from, kept so that it can be written again without some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError

if TYPE_CHECKING:
    from mplus.memory.stream import StreamState


@define(frozen=True, eq=False)
class Text:
    """One chunk that was written.

    Attributes:
        ids: ``[n]`` int32 on the CPU.
        source: number of its source.
        turn: chunks of a batch that were due at once have the same; grows from write to write.
    """

    ids: Tensor
    source: int
    turn: int


@define(frozen=True, eq=False)
class Texts:
    """What was written to a stream, in order. Immutable; later values share the texts of earlier ones.

    Attributes:
        generator: state of the stream's generator before the first of them was written.
        count: texts that belong to this value.
        shared: these by number, and behind them those of later values.
    """

    generator: Tensor
    count: int = 0
    shared: dict[int, Text] = field(factory=dict)

    def __len__(self) -> int:
        return self.count

    def chunks(self, first: int = 0) -> Sequence[Text]:
        """All of them but the ``first`` so many, oldest first."""
        return [self.shared[number] for number in range(first, self.count)]

    @property
    def last_turn(self) -> int:
        """Turn of the newest chunk; -1 where there is none."""
        return self.shared[self.count - 1].turn if self.count else -1

    def appended(self, text: Text) -> Texts:
        """These and one more."""
        # Indivisible, so of two futures of this memory one goes on with the shared texts and the other with a copy.
        if self.shared.setdefault(self.count, text) is text:
            return evolve(self, count=self.count + 1)
        return Texts.of(self.generator, [*self.chunks(), text])

    def without(self, source: int) -> Texts:
        """Those of all sources but one, in a list of their own."""
        return Texts.of(self.generator, (text for text in self.chunks() if text.source != source))

    @staticmethod
    def of(generator: Tensor, texts: Iterable[Text] = ()) -> Texts:
        """Just these."""
        kept = dict(enumerate(texts))
        return Texts(generator, len(kept), kept)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for a file."""
        texts = self.chunks()
        return {
            "generator": self.generator,
            "ids": torch.cat([torch.empty(0, dtype=torch.int32), *(text.ids for text in texts)]),
            "lengths": torch.tensor([len(text.ids) for text in texts], dtype=torch.int64),
            "sources": torch.tensor([text.source for text in texts], dtype=torch.int64),
            "turns": torch.tensor([text.turn for text in texts], dtype=torch.int64),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], known: int) -> Texts:
        """What ``tensors`` gave, of ``known`` sources. Raises MemoryMismatchError where they do not fit together."""
        ids, lengths, sources, turns = (tensors[name] for name in ("ids", "lengths", "sources", "turns"))
        facts = (lengths, sources, turns)
        if ids.dim() != 1 or ids.dtype != torch.int32 or any(t.dim() != 1 or t.dtype != torch.int64 for t in facts):
            raise MemoryMismatchError("ids must be int32 [n], lengths, sources and turns int64 [c]")
        if not lengths.shape == sources.shape == turns.shape or not _parts(lengths, len(ids)):
            raise MemoryMismatchError("lengths, sources and turns must be one per chunk, and the lengths add up")
        if bool(((sources < 0) | (sources >= known)).any()) or bool((turns.diff() <= 0).any()):
            raise MemoryMismatchError(f"sources must lie in 0 to {known - 1}, and turns grow from chunk to chunk")
        pieces = ids.clone().split(lengths.tolist()) if len(lengths) else ()
        texts = zip(pieces, sources.tolist(), turns.tolist(), strict=True)
        return Texts.of(tensors["generator"].clone(), (Text(*text) for text in texts))


def next_turn(states: Sequence[StreamState]) -> int:
    """The turn of chunks that are now written to streams of one memory."""
    return 1 + max((state.texts.last_turn for state in states if state.texts is not None), default=-1)


NAMES = ("generator", "ids", "lengths", "sources", "turns")
"""Names of the tensors."""


def _parts(lengths: Tensor, total: int) -> bool:
    return bool((lengths > 0).all()) and int(lengths.sum()) == total
