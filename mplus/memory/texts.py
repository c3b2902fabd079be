"""Texts: the ids of all chunks a stream was written from, kept so that it can be written again without some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.format.structure import LARGEST


@define(frozen=True, eq=False)
class Text:
    """One chunk that was written.

    Attributes:
        ids: ``[n]`` int32 on the CPU.
        source: number of its source.
        turn: chunks of a batch that were due at once have the same; grows from write to write.
        short: it was too short for a chunk, and left a row for each of its tokens at most.
    """

    ids: Tensor
    source: int
    turn: int
    short: bool = False


@define(frozen=True, eq=False)
class Waiting:
    """Text that waits to be written, as it is too short for a chunk.

    Attributes:
        ids: ``[n]`` int32 on the CPU.
        source: number of its source.
    """

    ids: Tensor
    source: int


@define(frozen=True, eq=False)
class Texts:
    """The texts written to a stream, in order. Immutable; later values share the texts of earlier ones.

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
        """Return all chunks but the ``first`` so many, oldest first."""
        return [self.shared[number] for number in range(first, self.count)]

    @property
    def last_turn(self) -> int:
        """The turn of the newest chunk; -1 where there is none."""
        return self.shared[self.count - 1].turn if self.count else -1

    def appended(self, text: Text) -> Texts:
        """Return these texts and one more."""
        # Indivisible, so of two futures of this memory one goes on with the shared texts and the other with a copy.
        if self.shared.setdefault(self.count, text) is text:  # nobody was here before
            return evolve(self, count=self.count + 1)
        return Texts.of(self.generator, [*self.chunks(), text])

    def without(self, source: int) -> Texts:
        """Return the texts of all sources but one, sharing nothing."""
        return Texts.of(self.generator, (text for text in self.chunks() if text.source != source))

    @staticmethod
    def of(generator: Tensor, texts: Iterable[Text] = ()) -> Texts:
        """Return a value of just these texts, sharing nothing."""
        kept = dict(enumerate(texts))
        return Texts(generator, len(kept), kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by name, for a file."""
        texts = self.chunks()
        short = [text.short for text in texts]
        return {
            "generator": self.generator,
            "ids": torch.cat([torch.empty(0, dtype=torch.int32), *(text.ids for text in texts)]),
            "lengths": torch.tensor([len(text.ids) for text in texts], dtype=torch.int64),
            "sources": torch.tensor([text.source for text in texts], dtype=torch.int64),
            "turns": torch.tensor([text.turn for text in texts], dtype=torch.int64),
            **({"short": torch.tensor(short)} if any(short) else {}),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], known: Tensor) -> Texts:
        """Make the value that ``tensors`` was called on, of the sources with the numbers ``known`` (``[n]`` int64).

        Raises MemoryMismatchError where they do not fit together.
        """
        pieces, turns = _pieces(tensors, known), tensors["turns"]
        if turns.shape != tensors["sources"].shape or turns.dtype != torch.int64 or bool((turns.diff() <= 0).any()):
            raise MemoryMismatchError("turns must be int64, one per chunk, and grow from chunk to chunk")
        if len(turns) and not 0 <= int(turns[0]) <= int(turns[-1]) <= LARGEST:
            raise MemoryMismatchError(f"turns must be from 0 to {LARGEST}, got {int(turns[0])} to {int(turns[-1])}")
        short = tensors.get("short", torch.zeros(len(turns), dtype=torch.bool))
        if short.shape != turns.shape or short.dtype != torch.bool:
            raise MemoryMismatchError(f"short must be bool, one per chunk, got {short.dtype} {list(short.shape)}")
        texts = zip(pieces, tensors["sources"].tolist(), turns.tolist(), short.tolist(), strict=True)
        return Texts.of(generator_in(tensors["generator"].clone()).get_state(), (Text(*text) for text in texts))


def generator_in(state: Tensor) -> torch.Generator:
    """Return a generator in this state. Raises MemoryMismatchError: it is none."""
    try:
        return torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise MemoryMismatchError(f"must be the state of a torch.Generator: {error}") from error


NAMES = ("generator", "ids", "lengths", "sources", "turns", "short")
"""Names of the tensors; ``short`` is there only if a chunk was."""


TAIL_NAMES = ("ids", "lengths", "sources")
"""Names of the tensors of a tail."""


def tail_tensors(tail: Sequence[Waiting]) -> dict[str, Tensor]:
    """Return a tail as tensors by name, for a file; nothing where nothing waits."""
    if not tail:
        return {}
    return {
        "ids": torch.cat([part.ids for part in tail]),
        "lengths": torch.tensor([len(part.ids) for part in tail], dtype=torch.int64),
        "sources": torch.tensor([part.source for part in tail], dtype=torch.int64),
    }


def tail_from(tensors: Mapping[str, Tensor], known: Tensor) -> tuple[Waiting, ...]:
    """Return the tail that ``tail_tensors`` was given, of the sources with the numbers ``known``.

    Raises MemoryMismatchError as texts do.
    """
    if not tensors:
        return ()
    return tuple(map(Waiting, _pieces(tensors, known), tensors["sources"].tolist()))


def _pieces(tensors: Mapping[str, Tensor], known: Tensor) -> Sequence[Tensor]:
    """Return copies of ``ids``, one for each of the ``lengths``; ``sources`` are checked too."""
    ids, lengths, sources = (tensors[name] for name in TAIL_NAMES)
    if (
        ids.dim() != 1
        or ids.dtype != torch.int32
        or any(t.dim() != 1 or t.dtype != torch.int64 for t in (lengths, sources))
    ):
        raise MemoryMismatchError("ids must be int32 [n], lengths and sources int64 [c]")
    if bool((ids < 0).any()):
        raise MemoryMismatchError(f"ids must be at least 0, got {int(ids.min())}")
    if (
        lengths.shape != sources.shape
        or bool((lengths < 1).any())
        or bool((lengths > len(ids)).any())
        or int(lengths.sum()) != len(ids)
    ):
        raise MemoryMismatchError(f"there must be one length for each source, and they must add up to {len(ids)}")
    if not bool(torch.isin(sources, known).all()):
        raise MemoryMismatchError("their sources must be sources of the stream")
    return ids.clone().split(lengths.tolist()) if len(lengths) else ()
