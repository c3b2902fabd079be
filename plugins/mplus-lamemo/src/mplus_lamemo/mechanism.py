"""LaMemoMechanism: a window of tokens whose places look ahead, on a rotary decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from attrs import define, evolve, field
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.config import JsonValue, MPlusConfig, number, one_of
from mplus.errors import InputError, NotSupported
from mplus.mechanisms.base import Kept, MemoryMechanism
from mplus.mechanisms.decoder import Adapter, Decoder, DecoderShape, Project, Text, side_by_side
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.mechanisms.root import Absorbed, Columns
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import Update, WriteContext
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus_lamemo.attention import Attention
from mplus_lamemo.refresh import Refresh, Refreshed
from mplus_lamemo.settle import settled
from mplus_lamemo.state import COLUMN, WindowState, state_of


class LaMemoAdditions(nn.Module):
    """The parameters that LaMemo adds to a rotary decoder.

    Attributes:
        direction: ``[L, H, D]``, added to the queries of the look-ahead of each head; zero at first. None where the
            look-ahead is as the decoder attends.
    """

    direction: nn.Parameter | None

    def __init__(self, direction: Tensor | None) -> None:
        super().__init__()
        self.direction = None if direction is None else nn.Parameter(direction)


class LaMemoMechanism(MemoryMechanism):
    """Keeps the newest ``short_term_tokens`` tokens, with what each of their places has attended to so far.

    It is a window and no long-term memory: of older tokens nothing is left but what younger places took in of them. A
    pretrained decoder has never looked ahead, so that its refresh has to be trained.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism="lamemo", chunk_tokens=64, short_term_tokens=128)
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of LaMemo on a rotary decoder.

        Attributes:
            direction: "mirrored": n to the right looks like n to the left, plus a learned vector for each head;
                "as-is": a key on the right has a negative distance.
            window: keys that are looked ahead to: as many as the "previous" segment has, so that each pair is seen
                once, or as the "present" one (the released code), which skips or doubles pairs where lengths change.
            epsilon: added below the fraction of the merge's weight (the released code: 1e-6).
        """

        direction: Literal["mirrored", "as-is"] = field(default="mirrored", validator=one_of("mirrored", "as-is"))
        window: Literal["previous", "present"] = field(default="previous", validator=one_of("previous", "present"))
        epsilon: float = field(default=0.0, validator=number(0))

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Return what differs in the variant "published": the released code's defects."""
            return {"window": "present", "epsilon": 1e-6} if variant == "published" else {}

    name = "lamemo"
    State: ClassVar[type[StreamState]] = WindowState
    attends: ClassVar[bool] = True
    keeps: ClassVar[frozenset[Kept]] = frozenset({"hidden"})
    keeps_states: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, int]] = {"chunk_tokens": 128, "short_term_tokens": 256}

    additions: LaMemoAdditions
    options: Options

    @classmethod
    def settle(cls, config: MPlusConfig, room: int | None) -> MPlusConfig:
        return settled(config, room, cls.sizes)

    @classmethod
    def build(cls, shape: DecoderShape, config: MPlusConfig, options: Any) -> LaMemoAdditions:
        """Make the direction vectors.

        Raises:
            NotSupported: the decoder has no rotary positions, its layers have heads of different numbers or sizes, or
                some of them carry no memory.
        """
        if shape.positions != "rotary" or shape.hybrid or None in (shape.heads, shape.head_size, shape.value_size):
            raise NotSupported(
                "LaMemo needs a decoder with rotary positions and equally many heads of one size in every layer, got "
                f"positions {shape.positions!r}, {shape.heads} heads"
                + (" and layers that carry no memory" if shape.hybrid else "")
            )
        if options.direction == "as-is":
            return LaMemoAdditions(None)
        return LaMemoAdditions(torch.zeros(shape.layers, shape.heads or 0, shape.head_size or 0))

    def layout(self, shape: DecoderShape, kept: Kept, projected_size: int) -> StoreLayout:
        width = (shape.heads or 0) * ((shape.value_size or 0) + 1)
        return evolve(super().layout(shape, "hidden", 0), hidden_size=width, extra=((COLUMN, (), torch.int32),))

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> WindowState:
        return WindowState.empty(layout)

    def reserve(self, layout: StoreLayout) -> int:
        return self.config.short_term_tokens * layout.row_bytes

    # ------------------------------------------------------------------ writing

    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        """Run one pass over the windows, of equal form, and a segment of each stream."""
        ids = text.need_ids()
        ahead = ids.shape[1] if self.options.window == "present" else None
        found = self._refreshed(decoder, [state_of(view) for view in views], ids, "write", ahead)
        window = [one.newest(self.config.short_term_tokens) for one in found.attention]
        return Update(tuple(map(_packed, window)))

    def absorb(self, state: Any, update: Update, source: int, context: WriteContext) -> Absorbed:
        if context.ids is None:
            raise InputError("absorb needs the ids of the segment that the places were made of, got none")
        device, count = context.store.layout.device, len(context.ids)
        tokens = torch.cat([state.tokens.cpu(), context.ids.cpu()]).to(device, torch.int32)
        births = torch.arange(state.clock, state.clock + count, device=device)
        window = []
        for before, made in zip(state.window, update.hidden, strict=True):
            first = len(before) + count - len(made)
            rows = MemoryRows(
                made.detach().to(device, context.store.layout.dtype),
                torch.cat([before.birth, births])[first:],
                torch.cat([before.source, torch.full_like(births, source)])[first:],
                extra={COLUMN: tokens[first:]},
            )
            window.append(rows)
        none = torch.empty(0, dtype=torch.int64, device=device)
        dropped = len(state) + count - len(window[0])
        after = evolve(
            state,
            window=tuple(window),
            clock=state.clock + count,
            ahead=torch.tensor(count),
            stale=torch.tensor(False),
        )
        return Absorbed(after, dropped, 0, {"window": (none,) * len(window)})  # all rows are others now

    # ------------------------------------------------------------------ reading

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Refresh every window up to its last token; windows of one form share a pass."""
        states = {id(view.state): state_of(view) for view in views}
        groups: dict[Any, list[WindowState]] = {}
        for state in states.values():
            if len(state):
                groups.setdefault(state.pass_key, []).append(state)
        inputs: dict[int, tuple[Tensor, ...]] = {}
        for group in groups.values():
            none = torch.empty(len(group), 0, dtype=torch.int64, device=decoder.shape.device)
            found = self._refreshed(decoder, group, none, "read").inputs
            inputs |= {id(state): tuple(layer[row] for layer in found) for row, state in enumerate(group)}
        return Opened(views, own=[inputs.get(id(view.state)) for view in views] if inputs else None)

    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...]:
        if opened.own is None:
            return ()
        rows = [hidden.new_empty(0, hidden.shape[2]) if one is None else one[layer].to(hidden) for one in opened.own]
        return (project(side_by_side(rows)),)

    def prefix_rows(self, view: StreamView) -> int:
        return len(state_of(view))

    # ------------------------------------------------------------------ both

    def _refreshed(
        self,
        decoder: Decoder,
        states: Sequence[WindowState],
        ids: Tensor,
        adapter: Adapter,
        ahead: int | None = None,
    ) -> Refreshed:
        """Run one pass over windows of one form and the segments ``ids`` ``[B, q]`` behind them.

        Args:
            decoder: runs it.
            states: one per segment, of equal ``pass_key``.
            ids: of the segments; q may be 0.
            adapter: of the pass.
            ahead: keys that the places have not looked at; None: as the states say.
        """
        first, window = states[0], torch.stack([state.tokens for state in states]).to(ids.device)
        m, carried = window.shape[1], tuple[Attention, ...]()
        ahead = int(first.ahead) if ahead is None else ahead
        if m and bool(first.stale):  # the tokens alone are known: as if they had been one segment
            with torch.no_grad():
                carried = Refresh(decoder).run(window, adapter).attention
            ahead = m
        elif m:
            heads, layers = decoder.shape.heads or 0, range(len(first.window))
            rows = [torch.stack([state.window[layer].need_hidden() for state in states]) for layer in layers]
            carried = tuple(_unpacked(hidden.to(ids.device), heads) for hidden in rows)
        refresh = Refresh(
            decoder,
            memory=m,
            ahead=ahead,
            carried=carried,
            direction=self.additions.direction,
            epsilon=self.options.epsilon,
        )
        return refresh.run(torch.cat([window, ids], 1), adapter)


def _packed(found: Attention) -> Tensor:
    """Return attention of n places as rows ``[B, n, H (D + 1)]``."""
    return torch.cat([found.vectors.transpose(1, 2).flatten(2), found.mass.transpose(1, 2)], -1)


def _unpacked(rows: Tensor, heads: int) -> Attention:
    """Return the attention that rows ``[B, n, H (D + 1)]`` are of."""
    vectors, mass = rows.split([rows.shape[-1] - heads, heads], -1)
    return Attention(vectors.unflatten(-1, (heads, -1)).transpose(1, 2), mass.transpose(1, 2))
