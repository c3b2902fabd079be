"""Copies of a decoder's layers that a mechanism trains and runs beside the decoder: a side network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from mplus.backends.base import AttentionRequest, AttentionResult
from mplus.mechanisms.opened import TokenTensors

LayerCall = Any
"""How the decoder called one of its layers in a pass (``PassResult.calls``): for ``CopiedLayer`` only."""
Attending = Callable[
    [Tensor], Callable[[AttentionRequest, Callable[[AttentionRequest], AttentionResult]], AttentionResult]
]
"""``attending(hidden [B, T, d])``: how a layer attends (``mplus.mechanisms.decoder.Attend``) to a text, which it is
given after the layer's input norm."""


class CopiedLayer(nn.Module):
    """A copy of one layer of a decoder, with parameters of its own.

    Attributes:
        index: of the layer, among all layers of the decoder.
    """

    index: int

    @abstractmethod
    def forward(
        self, hidden: Tensor, call: LayerCall, cache: TokenTensors | None = None, attending: Attending | None = None
    ) -> Tensor:
        """Return what the layer gives for ``hidden`` ``[B, T, d]``, called as the decoder called its own.

        Masks and positions are those of the call; both are brought to the dtype of the parameters.

        Args:
            hidden: what the layer receives.
            call: of the layer that this is a copy of, in a pass over the same text.
            cache: keeps keys and values of the text so far; it has room for one copy of each layer. None: the pass
                began with the text.
            attending: a way of its own to attend; None: as the decoder does.
        """

    @abstractmethod
    def unrotated(self, queries: Tensor, hidden: Tensor) -> Tensor:
        """Return the queries ``[B, H, T, D]`` of a text as they are before they are rotated.

        Args:
            queries: that attention gets (``AttentionRequest.queries``), returned where nothing is rotated.
            hidden: ``[B, T, d]``, the text after the layer's input norm (as ``attending`` gets it).
        """


class Copies(Protocol):
    """Makes copies of parts of a decoder, with its present weights; see ``DecoderShape.copies``."""

    def layer(self, index: int) -> CopiedLayer:
        """Return a copy of layer ``index``, of all layers. Raises NotSupported: it has no key/value attention."""

    def final_norm(self) -> nn.Module:
        """Return a copy of what the decoder puts its last hidden state through, in front of its head.

        Raises NotSupported where that is not a chain of modules.
        """
