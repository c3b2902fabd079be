"""Watch: notices when the weights that memory rows go through change, or the adapters that act on them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol, cast

from attrs import define, field
from torch import Tensor, nn

from mplus.errors import NotSupported
from mplus.hf.adapters.lora import adapted_projections, is_adapter, plain_name
from mplus.hf.adapters.peft_layers import AdaptedLayer, active, adapted_layer, is_peft_module
from mplus.hf.adapters.tensor_group import Mark, Moment, TensorGroup
from mplus.hf.retrofit.attention_probe import OwnAttention
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.hooks import Retrofit
from mplus.mechanisms.base import MemoryMechanism
from mplus.memory.weights_state import AdapterState, WeightsState
from mplus.stores.disk.locks import ProcessLock


class WatchedDecoder(Protocol):
    """The parts of a ``DecoderEngine`` that ``Watch``, on which it is built, looks at."""

    @property
    def model(self) -> nn.Module: ...

    retrofit: Retrofit
    mechanism: MemoryMechanism
    own_attention: OwnAttention

    def adapter(self, wanted: str) -> str | None:
        """Return the LoRA adapter of a pass, "write" or "read", or None without adapters."""

    def check_wrapped(self) -> None:
        """Raise MemoryMismatchError when the decoder was unwrapped."""


UNTOUCHED = "__base__"
"""What PEFT calls no adapter in ``adapter_names``."""

Switch = tuple[bool, tuple[str, ...], tuple[str, ...], tuple[str, ...]]
Switches = tuple[tuple[str, ...] | None, tuple[float, ...], tuple[Switch, ...]]
"""The adapter of each batch row, the scales of ours, and how each module of PEFT's is switched.

Switched, that is: whether its adapters are off, which are active, which are merged, and their scales.
"""


@define(frozen=True, eq=False)
class Look:
    """The weights and adapters as they were at one moment.

    Attributes:
        weights: with the adapters that are active.
        names: the adapter of each batch row, where the call around says so (PEFT's ``adapter_names``); else None.
        each: for each of ``names``, the weights with that adapter alone.
        switches: which adapters are switched on where, with which scaling.
        acting: adapters of the user that act anywhere in the decoder.
        contents: marks of the acting adapters, to compare with another look of this process.
        preparing: a mark of the mechanism's tensors that prepared reads are made with.
    """

    weights: WeightsState
    names: tuple[str, ...] | None
    each: Mapping[str, WeightsState]
    switches: Switches
    acting: tuple[str, ...]
    contents: tuple[Mark, ...]
    preparing: Mark

    def of_row(self, row: int, repeats: int) -> WeightsState:
        """Return the weights that stream ``row`` is read with, where each stream has ``repeats`` batch rows."""
        return self.weights if self.names is None else self.each[self.names[row * repeats]]


@define(eq=False)
class Plan:
    """The places of all weights and adapters, valid as long as no module and no parameter is exchanged.

    Attributes:
        modules, parameters: all of the decoder.
        tuned: PEFT's layers.
        base, key_base: the weights besides adapters that rows, and retriever keys, go through.
        own, key_own: the weights of our adapter for reading that rows, and retriever keys, go through.
        preparing: the mechanism's tensors that prepared reads are made with.
        scales: the scales of our adapters on each projection, by adapter.
        adapter: the name of ours for reading.
        adapters: the tensors of the user's adapters by scope and adapter; made when first asked for.
        every: all parameters; made when first asked for.
        last: the last look, and the switches and marks it was made from.
    """

    modules: list[nn.Module]
    parameters: list[Tensor | None]
    tuned: list[AdaptedLayer]
    base: TensorGroup
    key_base: TensorGroup
    own: TensorGroup
    key_own: TensorGroup
    preparing: TensorGroup
    scales: Sequence[dict[str, float]]
    adapter: str | None
    adapters: dict[tuple[str, str], TensorGroup] = field(factory=dict)
    every: TensorGroup | None = None
    last: tuple[tuple[Switches, tuple[Mark, ...]], Look] | None = None
    sampled: TensorGroup = field(init=False)
    full: TensorGroup = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.sampled = TensorGroup(dict(self.base.named + self.key_base.named).items(), sampled=True)
        parts = self.own.named + self.key_own.named + self.preparing.named
        self.full = TensorGroup(dict(parts).items(), sampled=False)

    def marks(self, moment: Moment) -> tuple[Mark, ...]:
        """Return marks that differ once any number looked at has changed."""
        names = dict.fromkeys(name for one in self.tuned for name in one.parts if self.may_act(one, name))
        return self.sampled.mark(moment), self.full.mark(moment), *(self.group("all", n).mark(moment) for n in names)

    def may_act(self, one: AdaptedLayer, name: str) -> bool:
        """Return whether an adapter acts in a layer, in all rows of a batch or in some."""
        return name in (*active(one.module), *(adapter_names(self.tuned) or ()))

    def own_scales(self) -> tuple[float, ...]:
        """Return the scale of our adapter for reading on each projection."""
        return tuple(scales[self.adapter] for scales in self.scales if self.adapter in scales)

    def group(self, scope: str, name: str) -> TensorGroup:
        """Return the tensors of adapter ``name`` in a scope: "projects", "keys", or "all"."""
        if (scope, name) not in self.adapters:
            layers = [one for one in self.tuned if name in one.parts and (scope == "all" or getattr(one, scope))]
            facts = [f"{one.path} {fact}\n" for one in layers for fact in one.facts.get(name, ())]
            named = [(f"{one.path}.{part}", tensor) for one in layers for part, tensor in one.parts[name]]
            self.adapters[scope, name] = TensorGroup(named, sampled=False, facts=facts)
        return self.adapters[scope, name]


class Watch:
    """Looks at a wrapped decoder's weights; those that did not change are not read again.

    All numbers of the adapters that act are read by every look, of other weights ``SAMPLES`` of each tensor: some code
    writes through ``tensor.data``, which leaves no trace.
    """

    def __init__(self, engine: WatchedDecoder) -> None:
        self._engine = engine
        self._plan: Plan | None = None
        self._lock = ProcessLock(threading.RLock)

    def forget(self) -> None:
        """Let the next look read everything."""
        self._plan = None

    def look(self) -> Look:
        """Return the weights as they are now.

        Raises:
            MemoryMismatchError: the decoder was unwrapped.
            NotSupported: there are adapters that memory does not go with.
        """
        self._engine.check_wrapped()
        with self._lock.here():
            plan, moment = self._present(), Moment()
            switches = cast("Switches", self.switches(plan))
            names = switches[0]
            present = (switches, plan.marks(moment))
            if plan.last is not None and plan.last[0] == present:
                return plan.last[1]
            each = {name: self._state(plan, moment, () if name == UNTOUCHED else (name,)) for name in set(names or ())}
            wanted = None if names is None else tuple(dict.fromkeys(names))
            acting = _in_order(plan, wanted, [name for one in plan.tuned for name in one.acting(wanted)])
            contents = tuple(plan.group("all", name).mark(moment) for name in acting)
            preparing = plan.preparing.mark(moment)
            look = Look(self._state(plan, moment, None), names, each, switches, acting, contents, preparing)
            plan.last = (present, look)
            return look

    def mark_of_all(self, look: Look) -> tuple[WeightsState, Switches, tuple[Mark, ...], Mark, Mark]:
        """Return what differs from that of another look where any pass of the decoder may come to something else."""
        with self._lock.here():
            plan = self._present()
            if plan.every is None:
                plan.every = TensorGroup(self._engine.model.named_parameters(), sampled=True)
            return look.weights, look.switches, look.contents, look.preparing, plan.every.mark()

    def with_adapters(self, names: Sequence[str]) -> WeightsState:
        """Return the weights as they would be if just these adapters of the user acted."""
        with self._lock.here():
            return self._state(self._present(), Moment(), tuple(names))

    def has_adapters_of_user(self) -> bool:
        """Return whether the user has adapters, active or not, on modules that memory rows go through."""
        with self._lock.here():
            return any(one.parts for one in self._present().tuned if one.projects)

    def look_at_names(self) -> tuple[str, ...] | None:
        """Return ``Look.names``."""
        return None if self._plan is None else adapter_names(self._plan.tuned)

    def switches(self, plan: Plan | None = None) -> Switches | None:
        """Return ``Look.switches``; no tensor is read."""
        plan = plan or self._plan
        if plan is None:
            return None
        switches = []
        for layer in (one.module for one in plan.tuned):
            scaling = getattr(layer, "scaling", None)
            scales = tuple(map(_plain, scaling.values())) if isinstance(scaling, dict) else ()
            switches.append((layer._disable_adapters, tuple(active(layer)), tuple(layer.merged_adapters), scales))
        return adapter_names(plan.tuned), plan.own_scales(), tuple(switches)

    def _state(self, plan: Plan, moment: Moment, wanted: tuple[str, ...] | None) -> WeightsState:
        adapter = self._engine.adapter("read")
        scales = _summary([_plain(scale) for scale in plan.own_scales()] or [""])
        own = [
            {adapter: f"{group.digest(moment)} x{scales}"} if adapter and not group.empty else {}
            for group in (plan.own, plan.key_own)
        ]
        projecting = _adapters(plan, moment, "projects", wanted, own[0])
        keys = _adapters(plan, moment, "keys", wanted, own[1])
        return WeightsState(projecting, plan.base.digest(moment), keys, plan.key_base.digest(moment))

    def _present(self) -> Plan:
        modules = _tree(self._engine.model)
        parameters: list[Tensor | None] = [tensor for module in modules for tensor in module._parameters.values()]
        plan = self._plan
        # By identity: PEFT exchanges modules and parameters in place, and equal tensors need not be the same ones.
        if plan is None or plan.modules != modules or list(map(id, plan.parameters)) != list(map(id, parameters)):
            follow_exchanged(self._engine.retrofit.anatomy.specs)
            plan = self._plan = make_plan(self._engine, modules, parameters)
        return plan


def adapter_names(tuned: Sequence[AdaptedLayer]) -> tuple[str, ...] | None:
    """Return the adapter of each batch row, where the call around passed PEFT's ``adapter_names``."""
    for one in tuned:
        for hook in one.module._forward_pre_hooks.values():
            if isinstance(hook, partial) and "adapter_names" in hook.keywords:
                return tuple(hook.keywords["adapter_names"])
    return None


def _adapters(
    plan: Plan, moment: Moment, scope: str, wanted: tuple[str, ...] | None, own: dict[str, str]
) -> AdapterState:
    """Describe the adapters that act in a scope: those ``wanted`` (None: the active ones), and ``own``, ours."""
    scales: dict[str, list[str]] = {}
    acts: dict[str, None] = {}
    for one in plan.tuned:
        if getattr(one, scope):
            acting, scaling = one.acting(wanted), getattr(one.module, "scaling", None)
            acts.update(dict.fromkeys(acting))
            merged = " merged" if one.module.merged_adapters else ""
            for name in one.parts:
                scale = _plain(scaling.get(name)) if isinstance(scaling, dict) else ""
                scales.setdefault(name, []).append(f"{scale}{merged}" if name in acting else "off")
    names = _in_order(plan, wanted, acts)
    contents = {**own, **{name: plan.group(scope, name).digest(moment) for name in names}}
    return AdapterState(names, {name: _summary(scales[name]) for name in names}, contents)


def _in_order(plan: Plan, wanted: tuple[str, ...] | None, acting: Iterable[str]) -> tuple[str, ...]:
    """Return the adapters that act, in the order in which they are switched on."""
    found = set(acting)
    order = active(plan.tuned[0].module) if wanted is None and plan.tuned else wanted or ()
    return tuple(dict.fromkeys(name for name in (*order, *sorted(found)) if name in found))


def _summary(scales: Sequence[str]) -> str:
    """Return one number where all layers agree, else those of each layer."""
    return scales[0] if len(set(scales)) == 1 else ", ".join(scales)


def _plain(value: float | Tensor | None) -> str:
    """Write a scale so that it is the same wherever it is kept."""
    return f"{float(value):.9g}" if isinstance(value, int | float | Tensor) else str(value)


# ---------------------------------------------------------------------- the plan


def make_plan(engine: WatchedDecoder, modules: list[nn.Module], parameters: list[Tensor | None]) -> Plan:
    """Sort out the parameters of the decoder behind ``engine``, which has these ``modules`` and ``parameters``."""
    specs = engine.retrofit.anatomy.specs
    norms = [spec.norm for spec in specs if spec.norm is not None]
    projecting: list[nn.Module] = [*norms, *(spec.attention for spec in specs)]
    if engine.mechanism.keeps_states:
        projecting = [engine.retrofit.anatomy.decoder]
    retriever = engine.mechanism.retriever
    keying: list[nn.Module] = []
    if retriever is not None and engine.mechanism.key_size:
        keying = [*(projecting if engine.own_attention.used else norms), retriever]
    inside = {"projects": _inside(projecting), "keys": _inside(keying)}
    paths = {module: name for name, module in engine.model.named_modules()}
    tuned = [
        adapted_layer(m, paths[m], **{k: m in part for k, part in inside.items()}) for m in modules if is_peft_module(m)
    ]
    of_adapters = {id(tensor) for one in tuned for parts in one.parts.values() for _, tensor in parts}
    adapter = engine.adapter("read")
    (base, own), (key_base, key_own) = (_rest(roots, paths, of_adapters, adapter) for roots in (projecting, keying))
    preparing = TensorGroup(engine.mechanism.prepare_tensors().items(), sampled=False)
    scales = [one.scaling for spec in specs for one in adapted_projections(spec.attention)]
    return Plan(modules, parameters, tuned, base, key_base, own, key_own, preparing, scales, adapter)


def _rest(
    roots: Sequence[nn.Module], paths: Mapping[nn.Module, str], adapters: set[int], adapter: str | None
) -> tuple[TensorGroup, TensorGroup]:
    """Return the weights that belong to no adapter, and our ``adapter``."""
    found: dict[int, tuple[str, Tensor]] = {}
    own: dict[int, tuple[str, Tensor]] = {}
    for root in roots:
        for name, tensor in root.named_parameters(prefix=paths[root]):
            # Under its name without PEFT, so that a digest does not change when an adapter comes or goes.
            plain = plain_name(name).replace(".original_module.", ".")
            if id(tensor) in adapters:
                continue
            if is_adapter(plain):
                if f".{adapter}." in plain:
                    own.setdefault(id(tensor), (plain, tensor))
            else:
                found.setdefault(id(tensor), (plain, tensor))
    return TensorGroup(found.values(), sampled=True), TensorGroup(own.values(), sampled=False)


def follow_exchanged(specs: Sequence[AttentionSpec]) -> None:
    """Let every spec have the norm that its layer has now: PEFT puts others in the place of those it trains.

    Raises:
        NotSupported: the attention module itself was exchanged, which took the memory with it.
    """
    for spec in specs:
        chain = _chain(spec.layer, spec.attention)
        if chain is None or any(map(is_peft_module, chain[:-1])):
            raise NotSupported(
                f"the attention module of layer {spec.layer_index} was exchanged or copied by PEFT (modules_to_save), "
                "and memory cannot follow it: adapt projections instead"
            )
        if spec.norm is not None:
            norm: nn.Module = spec.norm
            norms = _chain(spec.layer, norm)
            while norms is None and is_peft_module(norm):  # PEFT has taken away what it had put there
                norm = cast("nn.Module", getattr(norm, "base_layer", None) or norm.original_module)
                norms = _chain(spec.layer, norm)
            if norms is None:
                raise NotSupported(f"the norm of layer {spec.layer_index} was exchanged after mplus.wrap: wrap again")
            spec.norm = next((module for module in norms if is_peft_module(module)), norm)


def _chain(root: nn.Module, wanted: nn.Module) -> list[nn.Module] | None:
    """Return the modules from below ``root`` down to ``wanted``; None: it is not there."""
    for child in root._modules.values():
        if child is wanted:
            return [wanted]
        below = None if child is None else _chain(child, wanted)
        if child is not None and below is not None:
            return [child, *below]
    return None


def _inside(roots: Sequence[nn.Module]) -> set[nn.Module]:
    return {module for root in roots for module in root.modules()}


def _tree(root: nn.Module) -> list[nn.Module]:
    """Return all modules; ``root.modules()`` is several times slower."""
    # In the order of ``modules()``, hence the reversal: the last child would be taken first.
    found, waiting = [], [root]
    while waiting:
        module = waiting.pop()
        found.append(module)
        waiting.extend([child for child in module._modules.values() if child is not None][::-1])
    return found
