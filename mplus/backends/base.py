"""AttentionBackend: how text queries attend to memory segments and text together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from attrs import define
from torch import Tensor


@define(frozen=True, eq=False)
class Segment:
    """Memory rows seen by every query.

    Attributes:
        keys: ``[B or 1, Hkv, P, D]``, rotated where the decoder rotates keys; batch 1 is shared by all rows.
        values: ``[B or 1, Hkv, P, Dv]``.
        lengths: ``[B]`` int64, how many rows of each batch row are real; those behind them are filler and may hold
            anything. None when all rows are real.
        bias: ``[B or 1, Hkv or 1, P]`` floating, added to the scores of each key after the soft cap; None: nothing.
            The logarithm of a weight w makes a key count as w equal ones. Finite at real rows; fillers may hold
            anything.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None
    bias: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """``[B, P]`` bool, False at filler; None when all rows are real."""
        if self.lengths is None:
            return None
        return torch.arange(self.keys.shape[2], device=self.lengths.device) < self.lengths[:, None]


class Joined(Protocol):
    """Memory and text kept side by side in one tensor from call to call, for backends that attend to both at once."""

    @property
    def worthwhile(self) -> bool:
        """True where asking costs little (nothing is copied, or not often), so that a backend that need not ask may."""

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return keys ``[B, Hkv, P+S, D]`` and values ``[B, Hkv, P+S, Dv]`` of the request, to be read only."""


@define(frozen=True, eq=False, kw_only=True)
class AttentionRequest:
    """One attention call over ``[segments | text]``.

    Attributes:
        queries: ``[B, H, T, D]``.
        keys, values: text, ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]`` with ``S >= T``; H is a multiple of Hkv.
        segments: memory in front of the text, in order; every query sees all their real rows.
        mask: over the text only, broadcastable to ``[B, H, T, S]``; bool (True = visible) or additive float.
            None means causal, aligned at the bottom right: query i sees text keys 0 .. S-T+i.
        window: a query sees the text keys at most ``window - 1`` in front of its own, and all memory; None: all text.
        padding: ``[B]`` int64, how many of the first text keys nobody sees; None: all are text.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask is applied.
        sinks: ``[H]`` extra logits that take part in the softmax and carry no value.
        dropout: probability applied to the attention weights.
        need_weights: also return the weights ``[B, H, T, P+S]``.
        joined: ``segments`` and text again, side by side in one tensor; None where they are not kept so.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    segments: tuple[Segment, ...] = ()
    mask: Tensor | None = None
    window: int | None = None
    padding: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    need_weights: bool = False
    joined: Joined | None = None


@define(frozen=True, eq=False)
class AttentionResult:
    """``output`` ``[B, H, T, Dv]`` in the dtype of the queries; ``weights`` ``[B, H, T, P+S]`` if asked for."""

    output: Tensor
    weights: Tensor | None = None


class AttentionBackend(ABC):
    """Computes ``softmax(scale * Q [Km|Kt]^T + mask) [Vm|Vt]``; stateless. ``reference`` is the specification.

    Both methods get requests that ``mplus.backends.check_request`` has found to be well formed.

    Attributes:
        name: what a configuration calls it.
        supports_key_bias: whether it adds ``Segment.bias``; requests with one never reach a backend that does not.
        auto: whether ``backend="auto"`` may take it. Backends of plug-ins that say so are asked first, in the order of
            their names.

    Example:
        Attention written out, for plain causal text; ``backend="auto"`` asks the next backend for everything else.

        >>> from mplus.backends import AttentionBackend, AttentionResult, joined_keys_values, joined_visibility
        >>> class PlainBackend(AttentionBackend):
        ...     name, auto = "plain", True
        ...
        ...     def unsupported_reasons(self, request):
        ...         refused = ("mask", "padding", "softcap", "sinks", "dropout", "need_weights")
        ...         return [f"no {name}" for name in refused if getattr(request, name) not in (None, 0)]
        ...
        ...     def attend(self, request):
        ...         groups = request.queries.shape[1] // request.keys.shape[1]
        ...         keys, values = (part.repeat_interleave(groups, dim=1) for part in joined_keys_values(request))
        ...         scores = request.scale * request.queries @ keys.mT
        ...         hidden = ~joined_visibility(request)
        ...         return AttentionResult(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values)
        >>> one = torch.ones(1, 1, 1, 4)
        >>> PlainBackend().attend(AttentionRequest(queries=one, keys=one, values=one, scale=0.5)).output
        tensor([[[[1., 1., 1., 1.]]]])
    """

    name: ClassVar[str]
    supports_key_bias: ClassVar[bool] = False
    auto: ClassVar[bool] = False

    @abstractmethod
    def unsupported_reasons(self, request: AttentionRequest) -> list[str]:
        """Return everything about ``request`` that this backend cannot honour; empty when it can run it."""

    @abstractmethod
    def attend(self, request: AttentionRequest) -> AttentionResult:
        """Run a request for which ``unsupported_reasons`` is empty."""
