"""LayerCall: what one decoder layer was called with, so that it can be run again; and the tensors that it saved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from attrs import define
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mplus.errors import InputError, NotSupported
from mplus.hf.retrofit.attention import ModuleCall
from mplus.hf.retrofit.observed import AttentionObserver, observed_by
from mplus.hf.types import Argument
from mplus.training.activations.randomness import RandomState
from mplus.training.activations.saved import Outliving, last_tokens

CACHES = ("past_key_values", "layer_past")
LayerOutput = Tensor | tuple[Tensor, ...]
"""What a decoder layer returns: its hidden states, or a tuple that begins with them."""


@define(eq=False)
class LayerCall:
    """One call of a decoder layer, without the hidden states.

    Attributes:
        layer: the layer.
        forward: what is called.
        ready: context in which the layer calls attention functions that observers see.
        args, kwargs: its arguments; None stands for the hidden states.
        batch, tokens: of the hidden states ``[B, T, d]``.
        learns: whether these need a gradient.
        device: where they are.
        random: state of the generators before.
        autocast: the dtype that it is computed in by autocast; None: as the weights say.
    """

    layer: nn.Module
    forward: Callable[..., LayerOutput]
    ready: Callable[[], AbstractContextManager[None]]
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]
    batch: int
    tokens: int
    learns: bool
    device: torch.device
    random: RandomState
    autocast: torch.dtype | None

    @staticmethod
    def of(
        layer: nn.Module,
        forward: Callable[..., LayerOutput],
        ready: Callable[[], AbstractContextManager[None]],
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
    ) -> tuple[LayerCall, Tensor]:
        """Return the call, and the hidden states ``[B, T, d]``. Raises InputError where a cache goes along."""
        for name in CACHES:
            if kwargs.get(name) is not None:
                raise InputError(
                    f"{name} must be None where activations are recomputed or swapped, got a cache: call the decoder "
                    "with use_cache=False"
                )
        hidden = ModuleCall(args, kwargs).hidden
        rest = (None, *args[1:]) if args else ()
        named = kwargs if args else {**kwargs, "hidden_states": None}
        device = hidden.device
        mixed = torch.is_autocast_enabled(device.type)
        call = LayerCall(
            layer,
            forward,
            ready,
            rest,
            named,
            hidden.shape[0],
            hidden.shape[1],
            hidden.requires_grad,
            device,
            RandomState.now(device),
            torch.get_autocast_dtype(device.type) if mixed else None,
        )
        return call, hidden

    def outliving(self) -> Outliving:
        """Return the tensors that live longer than the layer's activations."""
        return Outliving.of(self.layer, (self.args, self.kwargs))

    def run(self, hidden: Tensor, observer: AttentionObserver | None, first: int = 0) -> LayerOutput:
        """Run the layer on hidden states ``[B, T - first, d]`` of the tokens from ``first`` on."""
        args, kwargs = self.args, self.kwargs
        if first:
            args = tuple(last_tokens(part, self.batch, self.tokens, first) for part in args)
            kwargs = {name: last_tokens(part, self.batch, self.tokens, first) for name, part in kwargs.items()}
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        return observed_by(observer, self.forward, *args, **kwargs)

    def again(
        self, hidden: Tensor, observer: AttentionObserver | None, wanted: set[int], count: int, first: int = 0
    ) -> dict[int, Tensor]:
        """Run the layer once more, and return what it saves outside of the observer's regions, by number.

        Args:
            hidden: ``[B, T - first, d]``, without a graph.
            observer: stands in for attention; where it has ``inside``, nothing is numbered while that is true.
            wanted: numbers to return.
            count: how many tensors it saved the first time.
            first: token with which ``hidden`` begins.

        Raises:
            NotSupported: it saves another number of tensors than it did.
        """
        found: dict[int, Tensor] = {}
        seen = 0

        def pack(tensor: Tensor) -> None:
            nonlocal seen
            if not getattr(observer, "inside", False):
                if seen in wanted:
                    found[seen] = tensor.detach()
                seen += 1

        def unpack(packed: None) -> Tensor:
            raise NotSupported("a decoder layer asked for gradients inside of its own forward: use activations 'keep'")

        hidden = hidden.detach().requires_grad_(self.learns)
        with (
            self.ready(),
            torch.enable_grad(),
            torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None),
            saved_tensors_hooks(pack, unpack),
        ):
            self.run(hidden, observer, first)
        if seen != count:
            raise NotSupported(
                f"{type(self.layer).__name__} saved {count} tensors for backward and {seen} when it was run again, so "
                "it cannot be recomputed: use activations 'keep' or 'swap'"
            )
        return found
