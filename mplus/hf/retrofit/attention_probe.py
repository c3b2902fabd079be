"""A decoder's own queries and keys without positions, for retrievers that rank rows by its attention."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mplus.backends.base import Segment
from mplus.errors import NotSupported
from mplus.hf.retrofit.attention import Captured
from mplus.hf.retrofit.context import Pass, run_in
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.hooks import Retrofit
from mplus.hf.retrofit.positions import rotary_at
from mplus.mechanisms.decoder import DecoderShape, Project
from mplus.retrievers.base import Heads


class ProbedEngine(Protocol):
    """The parts of ``DecoderEngine`` that are needed to run its attention modules alone."""

    retrofit: Retrofit
    shape: DecoderShape

    @property
    def device(self) -> torch.device: ...
    @property
    def hidden_dtype(self) -> torch.dtype: ...
    def adapter(self, wanted: str) -> str | None: ...
    def check_attention(self) -> None: ...


class OwnAttention:
    """``Projections`` of a wrapped decoder: those of a read, so with the adapter "read".

    Args:
        engine: its engine.

    Attributes:
        used: whether anybody has asked for anything, so that keys depend on the attention's weights.
    """

    def __init__(self, engine: ProbedEngine) -> None:
        self._engine = engine
        self.used = False

    def queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Return queries ``[B, P, H, D]`` of rows; see ``Projections``."""
        return self._capture(layer, hidden).queries.transpose(1, 2)  # type: ignore[union-attr]

    def keys(self, layer: int, hidden: Tensor) -> Tensor:
        """Return keys ``[B, P, Hkv, D]`` of rows; see ``Projections``."""
        return self._capture(layer, hidden).keys.transpose(1, 2)

    @torch.no_grad()
    def heads(self, layer: int) -> Heads:
        """Return the sizes of a layer's heads, found by projecting a row three times; see ``Projections``."""
        engine = self._engine
        # Any row will do. The begin row is there before there is a memory, and has the scale of real ones.
        row = engine.shape.begin[layer].to(engine.device, engine.hidden_dtype)
        spec = engine.retrofit.anatomy.specs[layer]
        who = f"{type(spec.attention).__name__} of layer {spec.layer_index}"
        try:
            found = self._capture(layer, row.expand(3, -1)[None])
        except NotSupported:
            raise
        except Exception as error:
            raise NotSupported(
                f"the retriever needs queries and keys of {who} outside a forward, which failed with "
                f"{type(error).__name__}: {error}; use another one, such as 'linear'"
            ) from error
        queries, keys = found.queries, found.keys
        if queries is None or queries.shape[-1] != keys.shape[-1] or queries.shape[1] % keys.shape[1]:
            shapes = f"{None if queries is None else list(queries.shape)} and {list(keys.shape)}"
            raise NotSupported(f"the retriever cannot compare queries and keys of {who}, of shapes {shapes}")
        for states in (queries, keys):
            if not torch.allclose(states[:, :, :1], states, rtol=1e-2, atol=1e-2 * float(states.abs().max())):
                raise NotSupported(f"{who} gives equal rows unequal queries or keys: positions cannot be left out")
        scale = keys.shape[-1] ** -0.5 if found.scale is None else found.scale
        return Heads(queries.shape[1], keys.shape[1], keys.shape[-1], scale)

    def _capture(self, layer: int, hidden: Tensor) -> Captured:
        engine, self.used = self._engine, True
        retrofit = engine.retrofit
        spec = retrofit.anatomy.specs[layer]
        if retrofit.technique != "attention":
            raise NotSupported(
                f"{type(spec.attention).__name__} attends by itself and does not show its queries, so rows cannot be "
                "ranked by its attention: use another retriever, such as 'linear'"
            )
        engine.check_attention()
        # Rotations are relative: with all rows at one position they cancel, whatever the frequencies.
        positions = torch.zeros(1, hidden.shape[1], dtype=torch.int64, device=hidden.device)
        rotary = rotary_at(spec, hidden, positions)
        active = Pass(Nothing(), engine.adapter("read"))
        return run_in(active, retrofit.capture, spec, hidden, positions, rotary, spec.call)


class Nothing:
    """No prefix in any layer."""

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        return ()
