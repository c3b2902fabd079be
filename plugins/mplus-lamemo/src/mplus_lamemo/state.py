"""WindowState: the newest tokens of a stream, and what their places have seen so far."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.state import StreamState, StreamView
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout

COLUMN = "token"
"""Column of rows: the token of the place, int32."""


@define(frozen=True, eq=False, kw_only=True)
class WindowState(StreamState):
    """The window of one stream.

    Attributes:
        window: per layer, the places of the newest tokens, oldest first: ``[c | z]``, ``H (Dv + 1)`` wide, and their
            tokens, the same in every layer.
        ahead: ``[]`` int64, keys of the window that the older ones have not looked at: the length of the last segment,
            of whose tokens they have seen the first one, and of the next segment the first one.
        stale: ``[]`` bool, whether the rows are to be computed anew from their tokens; they are zeros then.
    """

    lists: ClassVar[Mapping[str, str]] = {"window": "window"}

    window: tuple[MemoryRows, ...]
    ahead: Tensor
    stale: Tensor

    @classmethod
    def empty(cls, layout: StoreLayout) -> Self:
        """Return the state of a stream to which nothing was written."""
        none = torch.empty(0, dtype=torch.int64, device=layout.device)
        hidden = torch.empty(0, layout.hidden_size, dtype=layout.dtype, device=layout.device)
        rows = MemoryRows(hidden, none, none, extra={COLUMN: none.int()})
        return cls(window=(rows,) * layout.layers, ahead=torch.tensor(0), stale=torch.tensor(False))

    def __len__(self) -> int:
        return len(self.window[0])

    @property
    def tokens(self) -> Tensor:
        """``[m]`` int64, the tokens of the window."""
        return self.window[0].extra[COLUMN].long()

    def tensors(self) -> dict[str, Tensor]:
        return {"ahead": self.ahead, "stale": self.stale}

    @classmethod
    def from_parts(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor], **others: Any
    ) -> Self:
        state = super().from_parts(layout, rows, {name: tensor.cpu() for name, tensor in tensors.items()}, **others)
        for name, dtype in (("ahead", torch.int64), ("stale", torch.bool)):
            found = getattr(state, name)
            if found.dtype != dtype or found.dim():
                raise MemoryMismatchError(f"{name} must be one {dtype}, got {found.dtype} {list(found.shape)}")
        if int(state.ahead) < 0 or any(COLUMN not in part.extra for part in state.window):
            raise MemoryMismatchError("a window must have the token of every place, and look ahead by 0 tokens or more")
        return state

    def kept(self, places: Mapping[str, Sequence[Tensor]]) -> Self:
        """Return the window with these places only; what is left has seen the others, and is computed anew."""
        left = super().kept(places)
        same = all(len(own) == len(before) for own, before in zip(left.window, self.window, strict=True))
        return self if same else left.restart()

    def restart(self) -> Self:
        """Return the window with its tokens alone: what its places had seen is to be computed anew."""
        if not len(self):
            return evolve(self, ahead=torch.tensor(0), stale=torch.tensor(False))
        cleared = self.changed(lambda rows, name, layer: rows.replace(hidden=torch.zeros_like(rows.need_hidden())))
        return evolve(cleared, ahead=torch.tensor(0), stale=torch.tensor(True))

    @property
    def pass_key(self) -> Hashable:
        """What is equal in windows that share one pass."""
        return len(self), int(self.ahead), bool(self.stale)

    def mended_with(self, store: MemoryStore) -> tuple[Self, list[str]]:
        """Keep the places that are there in every layer."""
        births = [rows.birth for rows in self.window]
        whole = [torch.stack([torch.isin(own, other) for other in births]).all(0) for own in births]
        lost = max(int((~own).sum()) for own in whole)
        if not lost:
            return self, []
        return self.kept({"window": whole}), [f"{lost} places of the window, which are not whole"]


def state_of(view: StreamView) -> WindowState:
    """Return the state in a view of a stream of LaMemo."""
    return cast("WindowState", view.state)
