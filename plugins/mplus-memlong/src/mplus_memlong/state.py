"""MemLongState: the table of the groups whose keys and values a stream's store holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.state import StreamState, StreamView
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout

NAMES = ("group_length", "group_source", "group_time", "token_ids", "group_key", "recalls")


@define(frozen=True, eq=False, kw_only=True)
class MemLongState(StreamState):
    """The groups of one stream, oldest first. Their rows, one a token, lie in the store in the same order.

    All tensors are on the CPU, whatever the device of the rows. Under the released eviction (``evict="released"``) the
    rows of the store can be more or fewer than the tokens of the table, as in the released code.

    Attributes:
        group_length: ``[c]`` int64, tokens of each group.
        group_source: ``[c]`` int64, number of the source it was written from.
        group_time: ``[c]`` int64, the birth of its first row, ascending: its name in ``recalls``.
        token_ids: ``[n]`` int32, the tokens of all groups, one behind the other.
        group_key: ``[c, v]`` float32, the embedding of each group's text.
        recalls: ``[r, 2]`` int64, pairs of a group and one that its text found when it was written, both by
            ``group_time``. A group's counter is how often it stands in the second place.
    """

    lists: ClassVar[Mapping[str, str]] = {}

    group_length: Tensor
    group_source: Tensor
    group_time: Tensor
    token_ids: Tensor
    group_key: Tensor
    recalls: Tensor

    @classmethod
    def empty(cls) -> Self:
        """Return the state of a stream to which nothing was written."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(
            group_length=none,
            group_source=none,
            group_time=none,
            token_ids=none.int(),
            group_key=torch.empty(0, 0),
            recalls=none.view(0, 2),
        )

    @property
    def groups(self) -> int:
        """c."""
        return self.group_length.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of all groups together."""
        return self.token_ids.shape[0]

    @property
    def group_offset(self) -> Tensor:
        """``[c]`` int64, place of each group's first token in ``token_ids``, and of its first row in the store."""
        return self.group_length.cumsum(0) - self.group_length

    @property
    def counters(self) -> Tensor:
        """``[c]`` int64, how many of the groups that are still held found each group when they were written."""
        found = torch.searchsorted(self.group_time, self.recalls[:, 1].contiguous())
        return torch.bincount(found, minlength=self.groups)

    def places(self, groups: Tensor) -> Tensor:
        """Return ``[n]`` int64, the places of the rows of ``groups`` ``[k]`` int64, in that order."""
        lengths = self.group_length[groups]
        starts = (self.group_offset[groups] - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return starts + torch.arange(starts.shape[0])

    def with_group(self, ids: Tensor, source: int, key: Tensor, found: Tensor) -> Self:
        """Return this state with one group more, of ids ``[n]``, and the clock moved on.

        Args:
            ids: of the group.
            source: number of its source.
            key: ``[v]``, the embedding of its text.
            found: ``[f]`` int64, ``group_time`` of the groups that its text found.
        """
        new = torch.tensor([[ids.shape[0]], [source], [self.clock]])
        own = key.detach().to("cpu", torch.float32)[None]
        held = found[torch.isin(found, self.group_time)]
        return evolve(
            self,
            group_length=torch.cat([self.group_length, new[0]]),
            group_source=torch.cat([self.group_source, new[1]]),
            group_time=torch.cat([self.group_time, new[2]]),
            token_ids=torch.cat([self.token_ids, ids.to("cpu", torch.int32)]),
            group_key=torch.cat([self.group_key, own]) if self.groups else own,
            recalls=torch.cat([self.recalls, torch.stack([torch.full_like(held, self.clock), held], 1)]),
            clock=self.clock + ids.shape[0],
        )

    def with_groups(self, kept: Tensor) -> Self:
        """Return this state with the groups only for which ``kept`` ``[c]`` bool is True."""
        times = self.group_time[kept]
        return evolve(
            self,
            group_length=self.group_length[kept],
            group_source=self.group_source[kept],
            group_time=times,
            token_ids=self.token_ids[kept.repeat_interleave(self.group_length)],
            group_key=self.group_key[kept] if bool(kept.any()) else torch.empty(0, 0),
            recalls=self.recalls[torch.isin(self.recalls, times).all(1)],
        )

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_parts(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor], **others: Any
    ) -> Self:
        cls.check_lists(layout, rows)
        if tensors.keys() != set(NAMES):
            raise MemoryMismatchError(f"a table of groups must have the tensors {NAMES}, got {sorted(tensors)}")
        parts: dict[str, Any] = {name: tensor.cpu() for name, tensor in tensors.items()}
        state = cls(**parts, **others)
        state._check()
        return state

    def ids_of(self, number: int) -> Tensor:
        return self.token_ids[(self.group_source == number).repeat_interleave(self.group_length)]

    def forgotten(self, number: int) -> Self:
        return self.with_groups(self.group_source != number)

    @property
    def pass_key(self) -> tuple[()]:
        """Nothing: chunks of equal length share a pass, since no chunk is written behind others."""
        return ()

    @classmethod
    def mended(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[tuple[str, MemoryMismatchError]]]:
        """Exchange a table that was damaged for one without groups."""
        try:
            cls.from_parts(layout, rows, tensors, clock=torch.iinfo(torch.int64).max)
        except MemoryMismatchError as error:
            return cls.empty().tensors(), [("the table of groups, and with it all rows", error)]
        return dict(tensors), []

    def mended_with(self, store: MemoryStore) -> tuple[Self, list[str]]:
        """Keep the groups that have all their rows; take the rows of others out of ``store``."""
        births = store.column(0, "birth")
        births = torch.empty(0, dtype=torch.int64) if births is None else births.cpu()
        first, last = (torch.searchsorted(births, self.group_time + n) for n in (0, self.group_length))
        whole, lost = last - first == self.group_length, []
        state = self.with_groups(whole)
        wanted = state.group_time.repeat_interleave(state.group_length)
        starts = state.group_offset.repeat_interleave(state.group_length)
        inside = torch.isin(births, wanted + torch.arange(len(wanted)) - starts)
        if not bool(inside.all()):
            store.remove(0, store.ids(0)[(~inside).to(store.layout.device)])
            lost.append(f"{int((~inside).sum())} rows whose group is not whole")
        if not bool(whole.all()):
            lost.append(f"{int((~whole).sum())} of {len(whole)} groups, of which rows were lost")
        return state, lost

    def check_store(self, view: StreamView) -> None:
        """Raise MemoryMismatchError unless the stream's store has one row for each token."""
        count = view.store.count(0)
        if count != self.tokens:
            raise MemoryMismatchError(
                f"a stream of {self.tokens} tokens must have as many rows, got {count}: the memory was damaged, or its "
                "store was changed from outside; mplus memory repair takes out what does not fit"
            )

    def _check(self) -> None:
        """Raise MemoryMismatchError unless the tensors make up a table of groups in order of writing."""
        for name in NAMES[:4]:
            found, dtype = getattr(self, name), torch.int32 if name == "token_ids" else torch.int64
            if found.dim() != 1 or found.dtype != dtype:
                raise MemoryMismatchError(f"{name} must be {dtype} [n], got {found.dtype} {list(found.shape)}")
        length, time = self.group_length, self.group_time
        if not len(length) == len(time) == len(self.group_source) or int(length.sum()) != self.tokens:
            raise MemoryMismatchError(
                f"a table of {len(length)} groups of {int(length.sum())} tokens must have as many sources, times and "
                f"ids, got {len(self.group_source)}, {len(time)} and {self.tokens}"
            )
        bounds = torch.cat([time, torch.tensor([self.clock])])
        if bool((length < 1).any()) or bool((time < 0).any()) or bool((time + length > bounds[1:]).any()):
            raise MemoryMismatchError("groups must have at least one token each, and come one behind the other in time")
        keys, recalls = self.group_key, self.recalls
        if keys.dim() != 2 or len(keys) != len(length) or keys.dtype != torch.float32:
            raise MemoryMismatchError(
                f"group_key must be torch.float32 [{len(length)}, v], got {keys.dtype} {list(keys.shape)}"
            )
        if recalls.dim() != 2 or recalls.shape[1] != 2 or recalls.dtype != torch.int64:
            raise MemoryMismatchError(f"recalls must be torch.int64 [r, 2], got {recalls.dtype} {list(recalls.shape)}")
        if not bool(torch.isin(recalls, time).all()):
            raise MemoryMismatchError("recalls must be pairs of groups that are held, by their time")


def state_of(view: StreamView) -> MemLongState:
    """Return the state in a view of a stream of this mechanism."""
    return cast("MemLongState", view.state)
