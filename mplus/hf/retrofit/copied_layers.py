"""Copies of a decoder's layers and of its final norm, for mechanisms with a network beside the decoder."""

from __future__ import annotations

from copy import deepcopy

import torch
from attrs import define, evolve
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from mplus.errors import NotSupported
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.offloading import input_device
from mplus.hf.retrofit.attention import ModuleCall
from mplus.hf.retrofit.attention_probe import Nothing
from mplus.hf.retrofit.context import MemoryLayer, Pass, PrefixSource, drop_memory, run_in
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.hooks import AttentionHook, Retrofit
from mplus.hf.retrofit.positions import rotary_at
from mplus.hf.types import Argument
from mplus.mechanisms.copied_layers import Attending, CopiedLayer
from mplus.mechanisms.decoder import Attended, Project
from mplus.mechanisms.opened import TokenTensors


class LayerCopy(CopiedLayer):
    """A copy of a decoder layer, whose attention sees memory as that of the decoder's own layers does.

    Args:
        retrofit: how memory gets into the decoder's attention.
        spec: of the attention of the layer to be copied.
    """

    def __init__(self, retrofit: Retrofit, spec: AttentionSpec) -> None:
        super().__init__()
        self.index, self._retrofit = spec.layer_index, retrofit
        self.layer = _copied(spec.layer)
        names = {module: name for name, module in spec.layer.named_modules()}
        attention = self.layer.get_submodule(names[spec.attention])
        norm = None if spec.norm is None else self.layer.get_submodule(names[spec.norm])
        self._spec = evolve(spec, layer=self.layer, attention=attention, norm=norm)
        attention.register_forward_pre_hook(AttentionHook(retrofit, self._spec), with_kwargs=True)

    def forward(
        self, hidden: Tensor, call: ModuleCall, cache: TokenTensors | None = None, attending: Attending | None = None
    ) -> Tensor:
        hidden = hidden.to(next(self.layer.parameters()).dtype)
        kept = None if cache is None else _KeptText(cache, f"layer {self.index}", call, self._window)
        args = [kept if isinstance(one, Cache) else _to(one, hidden) for one in call.args]
        kwargs = {name: kept if isinstance(one, Cache) else _to(one, hidden) for name, one in call.kwargs.items()}
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = hidden
        else:
            args[0] = hidden
        mask = kwargs.get("attention_mask")
        if kept is not None and isinstance(mask, Tensor):  # a static cache has places that are not filled yet
            kwargs["attention_mask"] = mask[..., : kept.tokens + hidden.shape[1]]
        source: PrefixSource = Nothing() if attending is None else _Attends(attending)
        # Not __call__: checkpointing of gradients would run the layer again outside of this pass.
        output: Tensor | tuple[Tensor, ...] = run_in(Pass(source, None), self.layer.forward, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def unrotated(self, queries: Tensor, hidden: Tensor) -> Tensor:
        spec = self._spec
        if spec.rotary is None and not spec.rotates_inside:
            return queries
        positions = torch.zeros(1, hidden.shape[1], dtype=torch.int64, device=hidden.device)
        rotary = rotary_at(spec, hidden, positions)
        found = run_in(Pass(Nothing(), None), self._retrofit.capture, spec, hidden, positions, rotary, spec.call)
        if found.queries is None:
            raise NotSupported(f"{type(spec.attention).__name__} attends by itself and does not show its queries")
        return found.queries

    @property
    def _window(self) -> int | None:
        """Tokens that a query of the layer sees; None: all."""
        window: int | None = getattr(self._spec.attention, "sliding_window", None)
        return window


class _KeptText(Cache):
    """A key/value cache of one copied layer whose content lies in ``TokenTensors``.

    Args:
        kept: where that is.
        name: of the layer in there.
        call: of the layer that was copied; its mask says how many of the last tokens that one sees.
        window: tokens that a query sees; None: all.
    """

    layers = ()  # type: ignore[assignment]

    def __init__(self, kept: TokenTensors, name: str, call: ModuleCall, window: int | None) -> None:
        self._kept, self._names, self._window = kept, (f"{name}.keys", f"{name}.values"), window
        mask = call.kwargs.get("attention_mask")
        self._seen = mask.shape[-1] if isinstance(mask, Tensor) else None

    @property
    def tokens(self) -> int:
        """Tokens that are kept."""
        found = self._kept.tensors.get(self._names[0])
        return 0 if found is None else found.shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Argument, **kwargs: Argument
    ) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        keys, values = (
            self._kept.append(name, part.transpose(1, 2)).transpose(1, 2)
            for name, part in zip(self._names, new, strict=True)
        )
        # The decoder's own cache of a layer with a window has dropped what no query sees any more.
        seen = self._window if self._seen is None and key_states.shape[2] == 1 else self._seen
        return (keys, values) if seen is None else (keys[:, :, -seen:], values[:, :, -seen:])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens


@define(frozen=True, eq=False)
class _Attends:
    """A ``PrefixSource`` of one layer, which attends in a way of its own and sees nothing in front of its text."""

    attending: Attending

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> Attended:
        return Attended((), self.attending(hidden))


@define(eq=False)
class DecoderCopies:
    """Copies of parts of a decoder: ``mplus.mechanisms.copied_layers.Copies``.

    Attributes:
        decoder: the model, wrapped or about to be.
        retrofit: how memory gets into its attention.
    """

    decoder: PreTrainedModel
    retrofit: Retrofit

    def layer(self, index: int) -> LayerCopy:
        for spec in self.retrofit.anatomy.specs:
            if spec.layer_index == index:
                return LayerCopy(self.retrofit, spec)
        raise NotSupported(
            f"layer {index} of {type(self.decoder).__name__} cannot be copied into a side network: it has no attention "
            "that writes a key/value cache"
        )

    @torch.no_grad()
    def final_norm(self) -> nn.Module:
        root, layers = self.retrofit.anatomy.decoder, self.retrofit.anatomy.layers
        ran: list[tuple[nn.Module, tuple[Argument, ...], Tensor | tuple[Tensor, ...]]] = []
        watched = [layers[-1], *(child for child in root.children() if child is not layers)]
        handles = [one.register_forward_hook(lambda *found: ran.append(found)) for one in watched]
        try:
            with in_eval_mode(self.decoder):
                ids = torch.tensor([[1, 2, 3]], device=input_device(self.decoder))
                wanted: Tensor = root(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        chain: list[nn.Module] = []
        state: Argument = None
        for module, given, made in ran:
            if module is layers[-1]:
                state, chain = made[0] if isinstance(made, tuple) else made, []
            elif given and given[0] is state:
                state, chain = made, [*chain, _copied(module)]
        if not isinstance(state, Tensor) or not torch.equal(state, wanted):
            raise NotSupported(
                f"{type(root).__name__} does not put its last hidden state through modules alone, so they cannot be "
                "copied for a side network"
            )
        return chain[0] if len(chain) == 1 else nn.Sequential(*chain)


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy with parameters to be trained and without hooks, which shares the decoder's configuration."""
    values = [value for part in module.modules() for value in part.__dict__.values()]
    # Attention modules look there for the attention implementation that is in use.
    copy = deepcopy(module, {id(one): one for one in values if isinstance(one, PreTrainedConfig)})
    if isinstance(copy, MemoryLayer):
        drop_memory(copy)
    for part in copy.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return copy.requires_grad_(True)


def _to(value: Argument, like: Tensor) -> Argument:
    """Return ``value`` with floating tensors in the dtype of ``like``, tuples of them included."""
    if isinstance(value, tuple):
        return tuple(_to(one, like) for one in value)
    return value.to(like.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
