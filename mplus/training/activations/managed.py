"""ActivationPlan and ``manage_activations``: which layers keep, recompute or swap their activations, and how much."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from attrs import define, field
from torch import nn

from mplus.errors import ConfigError, HostMemoryError
from mplus.hf.model.observable import decoder_layers, observable
from mplus.hf.types import Argument
from mplus.training.activations.auto_share import AutoShare
from mplus.training.activations.counter import ActivationCounter
from mplus.training.activations.host_copies import HostCopies
from mplus.training.activations.layer_call import LayerCall, LayerOutput
from mplus.training.activations.layer_run import KeptLayer, LayerRun, RecomputedLayer
from mplus.training.activations.planning import (
    AUTO,
    KEPT_LAYERS,
    LayerBytes,
    check_settings,
    is_host_bytes,
    is_mode,
    is_share,
    swapped_tokens,
)
from mplus.training.activations.swapped_layer import SwappedLayer


@define(eq=False)
class ActivationPlan:
    """Rules for the activations of a decoder's layers, over the steps of a training.

    Attributes:
        activations: "keep", "recompute", "swap" or "memo".
        swapped_share: of the tokens of each layer that "memo" swaps; "auto", or None: found in the first step.
        host_bytes: the most that swapped activations may take of host memory; None: no limit.
        counter: bytes held and tokens recomputed.
        layers: of the decoder the plan was applied to last.
    """

    activations: str = field(default="keep", validator=is_mode)
    swapped_share: float | str | None = field(default=None, validator=is_share)
    host_bytes: int | None = field(default=None, validator=is_host_bytes)
    counter: ActivationCounter = field(factory=ActivationCounter)
    layers: int = field(default=0, init=False)
    _auto: AutoShare = field(init=False)
    _checked: set[int] = field(factory=set, init=False)
    _copies: dict[torch.device, HostCopies] = field(factory=dict, init=False)
    _last: weakref.ref[SwappedLayer] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        check_settings(self.activations, self.swapped_share, self.host_bytes)
        self._auto = AutoShare(self.host_bytes)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Run the layers of ``model`` by this plan in forwards inside; their backward may come later.

        Raises:
            ConfigError: the layers recompute their activations already, by gradient checkpointing or another plan.
            NotSupported: its layers or its attention cannot be told apart.
        """
        layers = decoder_layers(model)
        _refuse_recomputing(model, layers)
        self.layers = len(layers)
        before = [layer.__dict__.get("forward") for layer in layers]
        ready = partial(observable, model, attention=self.recomputes)
        with ready():
            try:
                for index, layer in enumerate(layers):
                    layer.forward = PlannedForward(self, index, layer, layer.forward, ready)
                yield
            finally:
                for layer, forward in zip(layers, before, strict=True):
                    layer.__dict__.pop("forward", None)
                    if forward is not None:
                        layer.forward = forward

    def run(self, index: int, call: LayerCall, hidden: torch.Tensor) -> LayerOutput:
        """Run one layer on hidden states ``[B, T, d]``, and time it while "auto" measures."""
        if index == 0 and not self.counter.host:
            self._auto.begin_step(call.device)
        run = self._layer_run(index, call, hidden)
        if not (self._auto.is_measuring and self._is_auto and call.device.type == "cuda"):
            return run.forward()
        # By the device's own clock: a forward returns before its kernels have run.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        output = run.forward()
        end.record()
        self._auto.time(begin, end)
        return output

    def _layer_run(self, index: int, call: LayerCall, hidden: torch.Tensor) -> LayerRun:
        if self.activations == "recompute":
            return RecomputedLayer(call, hidden, self.counter)
        if self.activations == "keep" or index >= self.layers - KEPT_LAYERS:
            return KeptLayer(call, hidden, self.counter)
        copies = self._copies.setdefault(call.device, HostCopies.of(call.device))
        last = None if self._last is None or index == 0 else self._last()
        run = SwappedLayer(call, hidden, self.counter, index, copies, self, last)
        self._last = weakref.ref(run)
        return run

    @property
    def _is_auto(self) -> bool:
        return self.activations == "memo" and self.swapped_share in {None, AUTO}

    @property
    def recomputes(self) -> bool:
        """Return whether a layer's tokens may be recomputed: always, but for the whole of a text that is swapped."""
        return self.activations == "memo" and self.swapped_share != 1

    def swapped(self, index: int, sizes: LayerBytes, tokens: int) -> int:
        """Return the number of a layer's tokens that are swapped; see ``swapped_layer.Budget``."""
        left = self.layers - KEPT_LAYERS - index
        room = None if self.host_bytes is None else (self.host_bytes - self.counter.host) // left
        whole = sizes.input + sizes.attention
        if self._is_auto:
            self._auto.note(sizes)
            count = swapped_tokens(self._auto.share, tokens)
            if room is not None and sizes.others:
                count = max(min(count, (room - whole) * tokens // sizes.others), 0)
        else:
            count = swapped_tokens(1.0 if self.activations == "swap" else float(self.swapped_share or 0), tokens)
        needed = whole + sizes.others * count // tokens
        if room is not None and needed > room:
            raise HostMemoryError(
                f"host_bytes must be at least {self.counter.host + left * needed} for {left} more layers of "
                f"{needed} bytes each beside the {self.counter.host} that are held, got {self.host_bytes}: raise it, "
                + ("or lower swapped_share" if count else "or use activations 'recompute'")
            )
        return count

    def is_checked(self, index: int) -> bool:
        """Return whether this layer's recomputation was looked at before; from now on it was."""
        known = index in self._checked
        self._checked.add(index)
        return known


@define(eq=False)
class PlannedForward:
    """Stands in the place of a layer's ``forward`` while a plan is applied.

    Attributes:
        plan: that is applied.
        index: of the layer.
        layer: the layer.
        forward: the method it had.
        ready: context in which it calls attention functions that observers see.
    """

    plan: ActivationPlan
    index: int
    layer: nn.Module
    forward: Callable[..., LayerOutput]
    ready: Callable[[], AbstractContextManager[None]]

    def __call__(self, *args: Argument, **kwargs: Argument) -> LayerOutput:
        """Run the layer by the plan, where a gradient is wanted."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return self.plan.run(self.index, *LayerCall.of(self.layer, self.forward, self.ready, args, kwargs))


def _refuse_recomputing(model: nn.Module, layers: list[nn.Module]) -> None:
    if any(isinstance(layer.__dict__.get("forward"), PlannedForward) for layer in layers):
        raise ConfigError("activations of this decoder are managed already: leave the other block first")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ConfigError(
            "gradient checkpointing of transformers must be off where mplus manages activations: call "
            "gradient_checkpointing_disable, and use activations = 'recompute'"
        )


@contextmanager
def manage_activations(
    model: nn.Module,
    activations: str,
    *,
    swapped_share: float | str | None = None,
    host_bytes: int | None = None,
) -> Iterator[ActivationCounter]:
    """Keep, recompute or swap the activations of a decoder's layers in forwards inside; backward may come later.

    For any decoder of transformers, wrapped by mplus or not. "memo" is MEMO (arXiv 2407.12117, section 3.2): of each
    layer but the last two, input and attention output go to host memory, the rest for a share of the tokens, and is
    recomputed for the others.

    Args:
        model: the decoder, its attention implementation "sdpa" or "eager".
        activations: "keep" (bytes are only counted), "recompute", "swap" or "memo".
        swapped_share: of the tokens, 0 to 1, of "memo"; "auto", or None: as much as fits, found in the first step.
        host_bytes: the most that the host may hold; None: no limit.

    Yields:
        The counter of bytes and tokens.

    Raises:
        ConfigError: a setting breaks its rule, or the decoder recomputes its activations already.
        NotSupported: the decoder's layers, or their attention, cannot be told apart.
        HostMemoryError: in a forward, where ``host_bytes`` are too few; the message says how many are needed.

    Example:
        ```python
        with manage_activations(model, "memo", swapped_share=0.5) as counter:
            loss = model(ids, labels=ids).loss
        print(counter.device, counter.host)
        loss.backward()
        ```
    """
    plan = ActivationPlan(activations, swapped_share, host_bytes)
    with plan.applied(model):
        yield plan.counter
