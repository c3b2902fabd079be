"""ShortTermState: the rows that M+ and MemoryLLM keep besides a store."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, Self, Unpack, cast

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.format.columns import forms
from mplus.memory.state import StateFields, StreamState, StreamView
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout


@define(frozen=True, eq=False, kw_only=True)
class ShortTermState(StreamState):
    """Short-term rows, those that wait for a merge, and counters.

    Attributes:
        stm: short-term rows of each layer, oldest first (layers differ in length only after ``forget``).
        pending: rows of each layer that left the STM and wait for the next merge; empty where there is no waiting.
        newest: per layer ``[c, d]``, hidden states of the newest short-term rows (K of them, where there are as many),
            which the next write reads; empty where the rows keep theirs.
        counters: the mechanism's own numbers, each a small tensor.
    """

    lists: ClassVar[Mapping[str, str]] = {"stm": "short-term", "pending": "pending"}

    stm: tuple[MemoryRows, ...]
    pending: tuple[MemoryRows, ...]
    newest: tuple[Tensor, ...] = ()
    counters: dict[str, Tensor] = field(factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        newest = {f"newest.{layer}": hidden for layer, hidden in enumerate(self.newest)}
        return {**newest, **{f"counter.{name}": value for name, value in self.counters.items()}}

    @classmethod
    def from_parts(
        cls,
        layout: StoreLayout,
        rows: Mapping[str, Sequence[MemoryRows]],
        tensors: Mapping[str, Tensor],
        **others: Unpack[StateFields],
    ) -> Self:
        cls.check_lists(layout, rows)
        newest = [f"newest.{layer}" for layer in range(0 if layout.keeps_hidden else layout.layers)]
        counters = {name: value for name, value in tensors.items() if name.startswith("counter.")}
        if set(newest) | counters.keys() != tensors.keys():
            raise MemoryMismatchError(
                f"a stream must have the tensors {newest} and counters, got {sorted(tensors.keys() - counters.keys())}"
            )
        for layer, name in enumerate(newest):
            _check_newest(tensors[name], rows["stm"][layer], layout, layer)
        return cls(
            stm=tuple(rows["stm"]),
            pending=tuple(rows["pending"]),
            newest=tuple(tensors[name].to(layout.device) for name in newest),
            counters={name.removeprefix("counter."): value for name, value in counters.items()},
            **others,
        )

    def kept(self, places: Mapping[str, Sequence[Tensor]]) -> Self:
        newest = tuple(self.newest_kept(layer, places["stm"][layer]) for layer in range(len(self.newest)))
        return evolve(super().kept(places), newest=newest)

    def newest_kept(self, layer: int, places: Tensor) -> Tensor:
        """Return what is left of ``newest`` when only this layer's short-term rows at ``places`` stay."""
        hidden = self.newest[layer]
        places = places.nonzero().squeeze(1) if places.dtype == torch.bool else places
        places = places - (len(self.stm[layer]) - hidden.shape[0])
        return hidden[places[places >= 0].to(hidden.device)]

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Self:
        return evolve(super().to(device, dtype), newest=tuple(hidden.to(device, dtype) for hidden in self.newest))

    @property
    def pass_key(self) -> Hashable:
        return tuple(len(rows) for rows in self.stm)

    @classmethod
    def births(cls, name: str, births: Tensor, clock: int) -> Tensor:
        """Short-term rows under "release" ages have births below 0, which count back from the present clock."""
        return torch.where(births < 0, births + clock, births) if name == "stm" else births

    def expiry_clock(self, layers: int) -> Tensor:
        return self.counters.get("decayed", super().expiry_clock(layers))

    @classmethod
    def mended(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[tuple[str, MemoryMismatchError]]]:
        """Exchange ``newest`` tensors that are not hidden states of short-term rows for none."""
        found, lost = dict(tensors), []
        for layer, part in enumerate(() if layout.keeps_hidden else rows.get("stm", ())):
            name = f"newest.{layer}"
            nothing = torch.empty(0, layout.hidden_size, dtype=layout.dtype)
            try:
                _check_newest(found.setdefault(name, nothing), part, layout, layer)
            except MemoryMismatchError as error:
                lost.append((f"{name}, all of it; the next write reads fewer rows", error))
                found[name] = nothing
        return found, lost

    def check_like(self, new: StreamState, where: str) -> None:
        if isinstance(new, ShortTermState) and forms(self.counters, 0) != forms(new.counters, 0):
            expected, found = forms(new.counters, 0), forms(self.counters, 0)
            raise MemoryMismatchError(f"{where} must have the counters {expected}, got {found}")
        super().check_like(new, where)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, of the hidden states kept of the newest ones, and of the text that waits."""
        rows = sum(rows.nbytes for rows in (*self.stm, *self.pending))
        return rows + sum(hidden.nbytes for hidden in self.newest) + self.tail_bytes

    def context(self, layer: int, count: int) -> MemoryRows:
        """Return the newest ``count`` short-term rows of a layer, oldest first, with their hidden states."""
        rows = self.stm[layer]
        rows = rows.select(slice(len(rows) - count, None))
        if not self.newest:
            return rows
        hidden = self.newest[layer]
        return rows.replace(hidden=hidden[hidden.shape[0] - count :])


def state_of(view: StreamView) -> ShortTermState:
    """Return the state in a view of a stream of M+ or MemoryLLM."""
    return short_term_state(view.state)


def short_term_state(state: StreamState) -> ShortTermState:
    """Return the state of a stream of M+ or MemoryLLM, whose streams have no others."""
    return cast("ShortTermState", state)


def _check_newest(newest: Tensor, rows: MemoryRows, layout: StoreLayout, layer: int) -> None:
    """Raise MemoryMismatchError unless ``newest`` are hidden states of some of the short-term ``rows`` of a layer."""
    most = len(rows)
    if newest.dtype != layout.dtype or newest.dim() != 2 or newest.shape[1] != layout.hidden_size or len(newest) > most:
        raise MemoryMismatchError(
            f"newest.{layer} must be {layout.dtype} [n, {layout.hidden_size}] with n of at most {most}, got "
            f"{newest.dtype} {list(newest.shape)}"
        )
