"""Where a decoder keeps its layers, attention, norms and rotary embeddings: found by a probing forward, not by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from attrs import define, field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mplus.errors import NotSupported
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.offloading import input_device
from mplus.hf.retrofit.attention import CaptureCache, Captured, ModuleCall
from mplus.hf.types import Argument

P = ParamSpec("P")
T = TypeVar("T")
Embeddings = Tensor | Sequence[Tensor]
"""What a rotary module makes of positions: cosines and sines, or complex numbers."""


@define(eq=False)
class AttentionSpec:
    """One attention module that writes a key/value cache, and how its layer calls it.

    Attributes:
        layer_index: place of the decoder layer in the stack.
        memory_index: place among the layers that carry memory.
        layer, attention: the modules.
        norm: module whose output the attention reads; None where it reads the layer's raw input (post-norm).
        cache_keyword: keyword of ``attention.forward`` for the cache.
        call: how the probe called ``attention``, without its cache and mask.
        rotary: the module that makes position embeddings; None: no rotation outside the attention module.
        rotary_call: how the probe called it.
        rotary_keyword: keyword of ``attention.forward`` for the position embeddings.
        rotates_inside: keys depend on ``position_ids``: the attention module rotates by itself.
    """

    layer_index: int
    memory_index: int
    layer: nn.Module
    attention: nn.Module
    norm: nn.Module | None
    cache_keyword: str
    call: ModuleCall
    rotary: nn.Module | None = None
    rotary_call: ModuleCall = field(factory=ModuleCall)
    rotary_keyword: str | None = None
    rotates_inside: bool = False


@define(eq=False)
class Anatomy:
    """The parts of a decoder that memory touches, as the probe found them.

    Attributes:
        decoder: the module that runs the layers (no output head).
        layers: the stack of decoder layers.
        specs: attention of each layer that carries memory, in order.
        alibi: whether attention takes an ALiBi bias.
        learned_positions: nothing positional happens in attention, so that text indices must not move.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    specs: list[AttentionSpec]
    alibi: bool
    learned_positions: bool

    @property
    def hybrid(self) -> bool:
        """Return whether some layers carry no memory."""
        return len(self.specs) < len(self.layers)


def find_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module that runs the decoder layers, and the stack. Raises NotSupported when there is none."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    candidates = [model.get_decoder(), model.base_model]
    for root in candidates:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return root, module
    raise NotSupported(
        f"{type(model).__name__} has no stack of {count} decoder layers (config.num_hidden_layers) that mplus can find"
    )


@define(eq=False)
class _Trace:
    """The calls that hooks saw during the probe."""

    running: list[nn.Module] = field(factory=list)
    calls: dict[nn.Module, ModuleCall] = field(factory=dict)
    made: dict[int, tuple[nn.Module, ModuleCall, Tensor]] = field(factory=dict)
    updates: dict[nn.Module, None] = field(factory=dict)

    def before(self, module: nn.Module, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> None:
        self.running.append(module)
        self.calls[module] = ModuleCall(args, kwargs)

    def after(
        self, module: nn.Module, args: tuple[Argument, ...], kwargs: dict[str, Argument], output: Embeddings
    ) -> None:
        call = ModuleCall(args, kwargs)
        self.running.pop()
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                # The tensor is kept so that its id stays its own.
                self.made.setdefault(id(tensor), (module, call, tensor))

    def maker(self, value: Argument) -> tuple[nn.Module, ModuleCall] | None:
        """Return the module that made ``value`` (a tensor, or a tuple starting with one), and how it was called."""
        tensor = value[0] if isinstance(value, tuple | list) and value else value
        found = self.made.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return None if found is None else found[:2]


@contextmanager
def _tracing(root: nn.Module, cache: Cache) -> Iterator[_Trace]:
    """Watch every module under ``root`` and every update of ``cache``."""
    trace, cls = _Trace(), type(cache)

    def noting(update: Callable[P, T]) -> Callable[P, T]:
        def noted(*args: P.args, **kwargs: P.kwargs) -> T:
            # The innermost running module is the one that owns keys and values.
            trace.updates.setdefault(trace.running[-1])
            return update(*args, **kwargs)

        return noted

    handles = []
    for module in root.modules():
        if module is not root:
            handles.append(module.register_forward_pre_hook(trace.before, with_kwargs=True))
            handles.append(module.register_forward_hook(trace.after, with_kwargs=True, always_call=True))
    # Of this one cache, which stays of its own kind for a decoder that asks.
    cache.__class__ = type(cls.__name__, (cls,), {"update": noting(cls.update)})
    try:
        yield trace
    finally:
        cache.__class__ = cls
        for handle in handles:
            handle.remove()


@torch.no_grad()
def discover(model: PreTrainedModel) -> Anatomy:
    """Probe ``model`` (in eval mode for the moment) with four tokens.

    Raises:
        NotSupported: no layer stack, no key/value cache, attention that does not take its cache by keyword, or the
            tokens cannot be read.
    """
    root, layers = find_layers(model)
    name = type(model).__name__
    try:
        with in_eval_mode(model):
            # Three go into the cache and one is watched: attention is called with a cache that holds something, as in
            # generation.
            ids = torch.tensor([[1, 2, 3, 4]], device=input_device(model))
            # The decoder makes the cache itself, of the kind that it needs.
            cache = _filled_cache(model, ids[:, :3])
            with _tracing(root, cache) as trace:
                model(input_ids=ids[:, 3:], attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    except NotSupported:
        raise
    except Exception as error:
        raise NotSupported(
            f"{name} cannot read four plain tokens one after the other, with a cache, which is how mplus finds its "
            f"attention: {type(error).__name__}: {error}"
        ) from error
    home = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    specs: list[AttentionSpec] = []
    for attention in sorted((module for module in trace.updates if module in home), key=home.__getitem__):
        specs.append(_spec(attention, home, layers, trace, cache, len(specs)))
    if not specs:
        raise NotSupported(f"{name} has no attention layer that writes a key/value cache; M+ needs attention")
    alibi = any(trace.calls[spec.attention].kwargs.get("alibi") is not None for spec in specs)
    if alibi and not hasattr(root, "build_alibi_tensor"):
        raise NotSupported(f"{name} uses ALiBi, and has no build_alibi_tensor that could extend it over memory")
    return Anatomy(
        decoder=root,
        layers=layers,
        specs=specs,
        alibi=alibi,
        learned_positions=not alibi and all(spec.rotary is None and not spec.rotates_inside for spec in specs),
    )


def _filled_cache(model: PreTrainedModel, ids: Tensor) -> Cache:
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    # Recurrent decoders return states of their own kind here.
    if not isinstance(cache, Cache):
        raise NotSupported(
            f"{type(model).__name__} has no attention layer that writes a key/value cache; M+ needs attention "
            f"(its past_key_values is {type(cache).__name__})"
        )
    return cache


def _spec(
    attention: nn.Module,
    home: Mapping[nn.Module, int],
    layers: nn.ModuleList,
    trace: _Trace,
    cache: Cache,
    memory_index: int,
) -> AttentionSpec:
    call = trace.calls[attention]
    index = home[attention]
    keyword = next((key for key, value in call.kwargs.items() if value is cache), None)
    if keyword is None:
        raise NotSupported(f"{type(attention).__name__} does not take its key/value cache by keyword")
    _check_width(attention, index, call.hidden, trace.calls.get(layers[index]))
    made_by = trace.maker(call.hidden)
    norm = (
        made_by[0]
        if made_by is not None and home.get(made_by[0]) == index and made_by[0] is not layers[index]
        else None
    )
    spec = AttentionSpec(
        layer_index=index,
        memory_index=memory_index,
        layer=layers[index],
        attention=attention,
        norm=norm,
        cache_keyword=keyword,
        call=ModuleCall(call.args, {**call.kwargs, keyword: None, "attention_mask": None}),
    )
    for key, value in call.kwargs.items():
        source = trace.maker(value)
        if source is not None and source[0] not in home and "mask" not in key and key != "hidden_states":
            spec.rotary, spec.rotary_call = source
            spec.rotary_keyword = key
    if spec.rotary is None:
        spec.rotates_inside = _rotates_inside(spec, call)
    return spec


def _check_width(attention: nn.Module, index: int, states: Tensor, call: ModuleCall | None) -> None:
    """Raise NotSupported where attention reads more than the layer's hidden states, which rows of memory are."""
    call = ModuleCall() if call is None else call
    hidden = call.args[0] if call.args else call.kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.shape[-1] != states.shape[-1]:
        raise NotSupported(
            f"{type(attention).__name__} of layer {index} attends to states of width {states.shape[-1]}, and the "
            f"layer's hidden states, which memory is made of, have {hidden.shape[-1]}"
        )


def _rotates_inside(spec: AttentionSpec, call: ModuleCall) -> bool:
    """Return whether the keys of one call change when its ``position_ids`` do."""
    place = call.kwargs.get("position_ids")
    if not isinstance(place, Tensor):
        return False
    keys = []
    for moved in (place, place + 1):
        try:
            changed = {"position_ids": moved, spec.cache_keyword: CaptureCache()}
            spec.attention.forward(*call.args, **{**call.kwargs, **changed})
        except Captured as captured:
            keys.append(captured.keys)
    return len(keys) == 2 and not torch.equal(*keys)
