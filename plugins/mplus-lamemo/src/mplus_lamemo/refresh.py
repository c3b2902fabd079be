"""Refresh: one pass over ``[window | segment]`` of a rotary decoder, in which the window looks ahead."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from attrs import define, field
from torch import Tensor

from mplus.backends.base import AttentionRequest, AttentionResult
from mplus.errors import NotSupported
from mplus.mechanisms.decoder import Adapter, Attended, Compute, Decoder, Project
from mplus_lamemo.attention import Attention, attended, causal, lookahead_keys, looks_ahead, merged


@define(frozen=True, eq=False)
class Refreshed:
    """What a pass over ``[window | segment]`` found.

    Attributes:
        attention: per layer, of all its places.
        inputs: per layer ``[B, n, d]``, what the layer received.
    """

    attention: tuple[Attention, ...]
    inputs: tuple[Tensor, ...]


@define(frozen=True, eq=False)
class Refresh:
    """One pass.

    Attributes:
        decoder: runs it.
        memory: places of the window, m.
        ahead: keys that they have not looked at.
        carried: per layer, what they have found so far; () where there are none.
        direction: ``[L, H, D]``, added to the queries of the look-ahead, whose rotation is mirrored; None: it is as it
            is.
        epsilon: of the merge.
    """

    decoder: Decoder
    memory: int = 0
    ahead: int = 0
    carried: Sequence[Attention] = ()
    direction: Tensor | None = None
    epsilon: float = 0.0
    _found: dict[int, Attention] = field(factory=dict, init=False)

    def run(self, ids: Tensor, adapter: Adapter) -> Refreshed:
        """Run the pass over ids ``[B, m + q]``."""
        found = self.decoder.run(ids, prefix=self._prefix, adapter=adapter, collect={"inputs"})
        return Refreshed(tuple(self._found[layer] for layer in sorted(self._found)), found.inputs)

    def _prefix(self, layer: int, hidden: Tensor, project: Project) -> Attended:
        return Attended((), partial(self._attend, layer))

    def _attend(self, layer: int, request: AttentionRequest, compute: Compute) -> AttentionResult:
        if request.sinks is not None:
            raise NotSupported("LaMemo merges attention by its mass, and this decoder's has sinks: use another decoder")
        m, groups = self.memory, request.queries.shape[1] // request.keys.shape[1]
        queries, keys, values = map(_wide, (request.queries, request.keys, request.values))
        keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
        visible = causal(m, keys.shape[2], keys.device)
        if request.mask is not None:
            visible = visible & _sees(request.mask[..., m:, : keys.shape[2]])
        found = attended(_scores(request, queries[:, :, m:], keys), values, visible)
        if m:
            new = self._look_ahead(layer, request, queries[:, :, :m], keys, values)
            found = Attention.cat([merged(self.carried[layer], new, self.epsilon)[0], found])
        self._found[layer] = found
        return AttentionResult(found.vectors.to(request.queries))

    def _look_ahead(
        self, layer: int, request: AttentionRequest, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Attention:
        """Return the attention of the window to the keys behind each place."""
        first, behind = lookahead_keys(self.memory, keys.shape[2], self.ahead)
        keys, values = keys[:, :, first:behind], values[:, :, first:behind]
        if self.direction is not None:
            places = torch.arange(max(self.memory, behind), device=keys.device)
            # Turned back by twice its place, what was turned by the place is turned the other way round.
            queries = self.decoder.rotated(layer, queries, -2 * places[: self.memory])
            keys = self.decoder.rotated(layer, keys, -2 * places[first:behind])
            towards = self.direction[layer].to(queries)[None, :, None].expand(1, -1, self.memory, -1)
            queries = queries + self.decoder.rotated(layer, towards, -places[: self.memory])
        sees = looks_ahead(self.memory, first, behind, keys.device)
        return attended(_scores(request, queries, keys), values, sees)


def _wide(part: Tensor) -> Tensor:
    """Return a tensor in float32 at least: a log-sum-exp in half precision is off by a percent."""
    return part if part.dtype in (torch.float32, torch.float64) else part.float()


def _scores(request: AttentionRequest, queries: Tensor, keys: Tensor) -> Tensor:
    scores = queries @ keys.mT * request.scale
    return scores if request.softcap is None else request.softcap * (scores / request.softcap).tanh()


def _sees(mask: Tensor) -> Tensor:
    """Return a mask, which may be one of numbers to be added, as bool."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
