"""Keys and values of memory rows, made once when a row is written and kept with it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from attrs import define, field
from torch import Tensor

from mplus.backends.base import Segment
from mplus.backends.checks import check_finite
from mplus.backends.triton.gather import gather_rotated, reasons_against_gathering
from mplus.hf.retrofit.attention_probe import Nothing
from mplus.hf.retrofit.context import Pass, run_in
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.hooks import Retrofit
from mplus.hf.retrofit.positions import MemoryPositions, Rotation, find_rotation, rotary_at
from mplus.mechanisms.decoder import Tables
from mplus.stores.base import Location

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.hf.retrofit.attention import Captured

CHECK_POSITIONS = (-7, -3, -2, -1)


@define(frozen=True, eq=False)
class Projection:
    """The projection of memory rows to keys and values in each layer, without the rotation of keys.

    Attributes:
        retrofit: how memory gets into the decoder's attention.
        adapter: the LoRA adapter of reading, or None.
        rotations: of each layer that carries memory.
        heads, width, value_width: Hkv, D and Dv.
        direct: of each layer, whether keys and values are what its ``k_proj`` and ``v_proj`` give, and nothing else.
    """

    retrofit: Retrofit = field(repr=False)
    adapter: str | None
    rotations: tuple[Rotation, ...]
    heads: int
    width: int
    value_width: int
    direct: tuple[bool, ...] = ()

    @property
    def positions(self) -> MemoryPositions:
        """The places of rows on the position axis."""
        return self.retrofit.positions

    @property
    def size(self) -> int:
        """Width of ``MemoryRows.projected``."""
        return self.heads * (self.width + self.value_width)

    def rows(self, layer: int, hidden: Tensor) -> Tensor:
        """Project memory rows ``[B, n, d]`` to ``[B, n, Hkv (D + Dv)]``: keys, not rotated, and behind them values.

        Gradients flow where they are enabled.
        """
        if not hidden.shape[1]:
            return hidden.new_empty(hidden.shape[0], 0, self.size)  # not every attention module takes no tokens
        if self.direct and self.direct[layer]:  # a third of the work, or less: queries are the most of it
            return _by_projections(self.retrofit.anatomy.specs[layer], self.adapter, hidden)
        found = _still(self.retrofit, self.adapter, layer, hidden)
        return torch.cat([found.keys.transpose(1, 2).flatten(2), found.values.transpose(1, 2).flatten(2)], -1)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Split ``[B, n, w]`` into keys ``[B, Hkv, n, D]`` and values ``[B, Hkv, n, Dv]``, views."""
        keys, values = projected.split([self.heads * self.width, self.heads * self.value_width], -1)
        return (
            keys.unflatten(-1, (self.heads, self.width)).transpose(1, 2),
            values.unflatten(-1, (self.heads, self.value_width)).transpose(1, 2),
        )

    def tables(self, layer: int, like: Tensor, positions: Tensor) -> Tables | None:
        """Return the tables that ``turned`` needs for rows at ``positions`` ``[B or 1, P]``."""
        return self.rotations[layer].tables(self.retrofit.anatomy.specs[layer], like, positions)

    def table_key(self, layer: int) -> tuple[int, str, Rotation]:
        """Return a key that is equal in layers with the same tables."""
        spec = self.retrofit.anatomy.specs[layer]
        given = (*spec.rotary_call.args, *spec.rotary_call.kwargs.values())
        plain = [value for value in given if not isinstance(value, Tensor)]
        return id(spec.rotary), repr(plain), self.rotations[layer]

    def picked(self, layer: int, begin: Tensor, found: Location, tables: Tables | None) -> Segment:
        """Return ``begin`` ``[1, w]`` and behind it the ``found`` rows ``[n, w]``, a segment.

        Rows are copied whole, and values stay as they lie in the copy: heads are far apart in a segment, and a
        memory of many rows is slow to reach.

        Raises:
            InputError: a number is NaN or infinite.
        """
        rotation = self.rotations[layer]
        # The kernel rotates first halves against second ones, and has one tile width for keys and values.
        width = max(self.width, self.value_width)
        halves = None if rotation.pairs != "half" else tables
        if halves is not None and not reasons_against_gathering(found.parts[0][0], *halves, width):
            return self._picked_by_kernel(layer, begin, *found.contiguous(), halves)
        rows = begin.new_empty(1 + sum(len(places) for _, places in found.parts), self.size)
        rows[0] = begin[0]
        found.copy_to(rows[1:])
        check_finite("long-term memory", rows)
        still, values = self.split(rows[None])
        if tables is None:
            return Segment(still, values)
        keys = rows.new_empty(still.shape)
        return Segment(rotation.apply(still, tables, keys), values)

    def _picked_by_kernel(self, layer: int, begin: Tensor, column: Tensor, places: Tensor, tables: Tables) -> Segment:
        """Do as ``picked`` on a GPU, where one kernel picks, splits and rotates. Not run on a GPU yet."""
        count = 1 + places.shape[0]
        keys = column.new_empty(1, self.heads, count, self.width)
        values = column.new_empty(1, self.heads, count, self.value_width)
        still, values[:, :, :1] = self.split(begin[None])
        cos, sin = tables
        self.rotations[layer].apply(still, (cos[:, :1], sin[:, :1]), keys[:, :, :1])
        gather_rotated(column, places, cos[0, 1:], sin[0, 1:], keys[0, :, 1:], values[0, :, 1:])
        check_finite("long-term memory", keys, values)
        return Segment(keys, values)

    def turned(self, layer: int, parts: Sequence[Tensor], tables: Tables | None) -> Segment:
        """Rotate rows ``[B, n_i, w]``, one part behind the other, to a segment of attention."""
        batch = max(part.shape[0] for part in parts)
        count = sum(part.shape[1] for part in parts)
        keys = parts[0].new_empty(batch, self.heads, count, self.width)
        values = parts[0].new_empty(batch, self.heads, count, self.value_width)
        start = 0
        for part in parts:
            place = slice(start, start + part.shape[1])
            still, own = self.split(part.expand(batch, -1, -1))
            here = None if tables is None else (tables[0][:, place], tables[1][:, place])
            self.rotations[layer].apply(still, here, keys[:, :, place])
            values[:, :, place] = own
            start = place.stop
        return Segment(keys, values)


def find_projection(retrofit: Retrofit, adapter: str | None, rows: Sequence[Tensor]) -> Projection | str:
    """Find out how rows can be kept projected in this decoder, or why they cannot.

    Args:
        retrofit: as chosen for the decoder.
        adapter: of reading.
        rows: per layer that carries memory ``[1, 4, d]``, different rows to try it with.
    """
    if retrofit.technique != "attention":
        return "the decoder computes attention by itself, so its keys cannot be had before they are turned"
    if retrofit.positions.offset:
        return "its rotary frequencies depend on the length of what is read"
    rotations, shapes, direct = [], set(), []
    with torch.no_grad():
        for spec, hidden in zip(retrofit.anatomy.specs, rows, strict=True):
            still = _still(retrofit, adapter, spec.memory_index, hidden)
            positions = torch.tensor([CHECK_POSITIONS], device=hidden.device)
            turned = _capture(retrofit, adapter, spec, hidden, positions)
            # Bit for bit: the same module ran on the same rows, so only a position can make a difference.
            if not torch.equal(still.values, turned.values):
                return f"{type(spec.attention).__name__} of layer {spec.layer_index} moves its values with positions"
            rotation = find_rotation(spec, still.keys, turned.keys, hidden, positions)
            if isinstance(rotation, str):
                return rotation
            cached = _capture(retrofit, adapter, spec, hidden, positions, at_cache=True)
            if not (_alike(cached.keys, turned.keys) and _alike(cached.values, turned.values)):
                return (
                    f"{type(spec.attention).__name__} of layer {spec.layer_index} changes keys and values between its "
                    "cache and attention"
                )
            rotations.append(rotation)
            direct.append(_is_direct(retrofit, spec, adapter, hidden, still))
            shapes.add((still.keys.shape[1], still.keys.shape[3], still.values.shape[3]))
    if len(shapes) > 1:
        return f"its layers have keys and values of different shapes, {sorted(shapes)} (heads, width, value width)"
    return Projection(retrofit, adapter, tuple(rotations), *shapes.pop(), direct=tuple(direct))


@torch.no_grad()
def rotation_of(retrofit: Retrofit, layer: int, like: Tensor) -> Rotation | str:
    """Find out how a layer turns its keys, or why that is not known.

    Args:
        retrofit: as chosen for the decoder.
        layer: index among the layers that carry memory.
        like: ``[1, 1, d]``, what it may receive: rows as large as that are tried.
    """
    if retrofit.technique != "attention":
        return "the decoder computes attention by itself, so its keys cannot be had before they are turned"
    if retrofit.positions.offset:
        return "its rotary frequencies depend on the length of what is read"
    spec, generator = retrofit.anatomy.specs[layer], torch.Generator().manual_seed(0)
    some = torch.randn(1, len(CHECK_POSITIONS), like.shape[2], generator=generator).to(like)
    hidden = (some * (float(like.float().std()) or 1.0)).to(like)
    positions = torch.tensor([CHECK_POSITIONS], device=hidden.device)
    still, turned = _still(retrofit, None, layer, hidden), _capture(retrofit, None, spec, hidden, positions)
    return find_rotation(spec, still.keys, turned.keys, hidden, positions)


def _is_direct(retrofit: Retrofit, spec: AttentionSpec, adapter: str | None, hidden: Tensor, still: Captured) -> bool:
    """Return whether rows ``[1, 4, d]`` get the keys and values ``still`` from two linear layers of usual names."""
    sizes = [getattr(getattr(spec.attention, name, None), "in_features", None) for name in ("k_proj", "v_proj")]
    # Values that are clipped need not show it in the rows that it is tried with.
    if sizes != [hidden.shape[-1]] * 2 or getattr(retrofit.anatomy.decoder.config, "clip_qkv", None) is not None:
        return False
    wanted = torch.cat([part.transpose(1, 2).flatten(2) for part in (still.keys, still.values)], -1)
    return torch.equal(_by_projections(spec, adapter, hidden), wanted)


def _by_projections(spec: AttentionSpec, adapter: str | None, hidden: Tensor) -> Tensor:
    """Return ``[B, n, Hkv (D + Dv)]`` of rows ``[B, n, d]``: keys, not rotated, and behind them values."""
    normed = hidden if spec.norm is None else spec.norm(hidden)
    projections = map(spec.attention.get_submodule, ("k_proj", "v_proj"))
    parts = [run_in(Pass(Nothing(), adapter), part, normed) for part in projections]
    return torch.cat(parts, -1)


def _still(retrofit: Retrofit, adapter: str | None, layer: int, hidden: Tensor) -> Captured:
    positions = torch.zeros(1, hidden.shape[1], dtype=torch.int64, device=hidden.device)
    return _capture(retrofit, adapter, retrofit.anatomy.specs[layer], hidden, positions)


def _capture(
    retrofit: Retrofit,
    adapter: str | None,
    spec: AttentionSpec,
    hidden: Tensor,
    positions: Tensor,
    *,
    at_cache: bool = False,
) -> Captured:
    normed = hidden if spec.norm is None else spec.norm(hidden)
    rotary = rotary_at(spec, normed, positions)
    capture = partial(retrofit.capture, at_cache=at_cache)
    return run_in(Pass(Nothing(), adapter), capture, spec, normed, positions, rotary, spec.call)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Return whether keys, or values, ``[1, Hkv, n, D]`` are the same numbers, of one shape."""
    return one.shape == other.shape and torch.equal(one, other)
