"""HMTState: what a stream of HMT remembers besides its list of memory vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.state import StreamState, StreamView
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import StoreLayout


@define(frozen=True, eq=False, kw_only=True)
class HMTState(StreamState):
    """The sensory tokens of one stream. Its memory vectors are the rows of its store, the oldest first.

    Attributes:
        sensory: ``[s]`` int32 on the CPU, the last tokens of the last segment, at most ``sensory_tokens``.
        sensory_source: ``[]`` int64, the number of the source they came from; ``NO_SOURCE`` where there are none.
        newest_only: the newest vector is read in the place of a recalled one, as in the first stage of training; never
            saved.
    """

    lists: ClassVar[Mapping[str, str]] = {}

    sensory: Tensor
    sensory_source: Tensor
    newest_only: bool = False

    @classmethod
    def empty(cls) -> Self:
        """Return the state of a stream to which nothing was written."""
        return cls(sensory=torch.empty(0, dtype=torch.int32), sensory_source=torch.tensor(NO_SOURCE))

    def with_segment(self, ids: Tensor, source: int, sensory_tokens: int) -> Self:
        """Return this state with the last tokens of a segment ``[n]`` of ``source``, and the clock moved on."""
        last = ids[max(len(ids) - sensory_tokens, 0) :].to("cpu", torch.int32, copy=True)
        number = source if len(last) else NO_SOURCE
        return evolve(self, sensory=last, sensory_source=torch.tensor(number), clock=self.clock + 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"sensory": self.sensory, "sensory_source": self.sensory_source}

    @classmethod
    def from_parts(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor], **others: Any
    ) -> Self:
        state = super().from_parts(layout, rows, {name: tensor.cpu() for name, tensor in tensors.items()}, **others)
        for name, dtype, dims in (("sensory", torch.int32, 1), ("sensory_source", torch.int64, 0)):
            found = getattr(state, name)
            if found.dtype != dtype or found.dim() != dims:
                raise MemoryMismatchError(
                    f"{name} must be {dtype} of {dims} dimensions, got {found.dtype} {list(found.shape)}"
                )
        return state

    def forgotten(self, number: int) -> Self:
        if int(self.sensory_source) != number:
            return self
        return evolve(self, sensory=self.sensory[:0], sensory_source=torch.tensor(NO_SOURCE))

    @property
    def pass_key(self) -> int:
        """The number of sensory tokens: lists of any length share a pass."""
        return len(self.sensory)


def state_of(view: StreamView) -> HMTState:
    """Return the state in a view of a stream of HMT."""
    return cast("HMTState", view.state)
