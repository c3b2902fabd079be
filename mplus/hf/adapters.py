"""The LoRA adapters "write" and "read", switched per pass and never by changing module state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mplus.config import AdapterConfig
from mplus.errors import ConfigError, NotSupported
from mplus.hf.discovery import Anatomy
from mplus.hf.modes import execution_device
from mplus.hf.names import ADAPTERS
from mplus.hf.passes import change_class, current_pass, rebuild, subclass


class PassAdapter:
    """Mixed into PEFT's LoRA layers: the active adapters are the user's own and that of the current pass.

    PEFT's ``set_adapter`` would change ``requires_grad`` and the module itself: gradients of the other adapter get
    lost, a recomputation in backward uses the wrong one, and threads disturb each other.
    """

    @property
    def active_adapter(self) -> list[str]:
        """Names of the adapters that act now."""
        chosen: Any = self._active_adapter  # type: ignore[attr-defined]
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        active = current_pass()
        ours = [] if active is None or active.adapter is None else [active.adapter]
        return [name for name in names if name not in ADAPTERS] + ours

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Switch the user's adapters. Ours stay as trainable as they are, where PEFT freezes all others."""
        layer: Any = self
        ours = [
            layer.get_submodule(f"{f}.{n}").weight for f in ("lora_A", "lora_B") for n in ADAPTERS if n in layer.lora_A
        ]
        trainable = [weight.requires_grad for weight in ours]
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        for weight, wanted in zip(ours, trainable, strict=True):
            weight.requires_grad_(wanted)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: PEFT bypasses every adapter of a layer with merged weights, ours included."""
        raise NotSupported("adapters cannot be merged into a decoder with memory: use mplus.unwrap first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (pass_adapter_class, type(self).__mplus_base__), self.__dict__  # type: ignore[attr-defined]


def pass_adapter_class(base: type) -> type:
    """``base`` with ``PassAdapter`` mixed in."""
    return subclass(base, PassAdapter)


def add_adapters(model: nn.Module, anatomy: Anatomy, config: AdapterConfig) -> None:
    """Inject both adapters (one when ``shared``) into the layers that carry memory.

    Adapters of the user stay active, and ``requires_grad`` of everything that was there stays as it was.

    Raises:
        ConfigError: ``target_modules`` names something that is no projection of these layers.
        NotSupported: adapters of the user are merged, or have one of our names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    _refuse_conflicts(model)
    targets = find_targets(_Stack(model, anatomy.layers), anatomy, config.target_modules)
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = {module: module._active_adapter for module in model.modules() if _is_tuned(module)}
    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    for name in ["write"] if config.shared else ["write", "read"]:
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT scales by a float as well
            lora_dropout=config.dropout,
            target_modules=targets,
            fan_in_fan_out=transposed,
        )
        inject_adapter_in_model(lora, _Stack(model, anatomy.layers), adapter_name=name)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(parameter, True))
    for module in filter(_is_tuned, model.modules()):
        setattr(module, "_active_adapter", active.get(module, []))  # noqa: B010  (unknown to nn.Module)
    for layer in lora_layers(model):
        _bring_back(layer)
        layer.train(layer.get_base_layer().training)
        change_class(layer, pass_adapter_class(type(layer)))


def _bring_back(layer: Any) -> None:
    """Adapters of a weight that accelerate keeps elsewhere: PEFT has put them on the meta device as well."""
    for name in [name for name in ADAPTERS if name in layer.lora_A and layer.lora_A[name].weight.device.type == "meta"]:
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.to_empty(device=execution_device(layer.get_base_layer()))
        layer.reset_lora_parameters(name, init_lora_weights=True)


class _Stack(nn.Module):
    """Decoder layers as a model of their own, for PEFT to inject into.

    In a model whose kind it knows PEFT moves targets (DeepSeek's dense MLPs, to the experts), and leaves its
    ``peft_config``, which PEFT and Trainer would take for a user's.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer"):  # what PEFT chooses layer classes by
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))


def remove_adapters(model: nn.Module) -> None:
    """Undo ``add_adapters``; adapters of the user stay."""
    for layer in lora_layers(model):
        change_class(layer, type(layer).__mplus_base__)
        for name in [name for name in layer.lora_A if name in ADAPTERS]:
            layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, child = _path(model, layer).rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


def lora_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers in ``model`` that hold one of our adapters."""
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer) and any(name in m.lora_A for name in ADAPTERS)]


def find_targets(model: nn.Module, anatomy: Anatomy, wanted: Sequence[str] | None = None) -> list[str]:
    """Names in ``model`` of the projections to adapt in the layers that carry memory.

    Args:
        wanted: ends of names; None: attention and dense MLPs. Mixture-of-experts blocks are then left alone: their
            routers and experts are no plain projections.

    Raises:
        ConfigError: one of ``wanted`` matches nothing.
    """
    names = {module: name for name, module in model.named_modules()}
    projections: dict[str, nn.Module] = {}
    mixed: set[nn.Module] = set()
    for spec in anatomy.specs:
        tuned = [module for module in spec.layer.modules() if _is_tuned(module)]
        inside = {part for module in tuned for part in module.modules() if part is not module}
        for module in spec.layer.modules():
            if (_is_projection(module) or _is_tuned(module)) and module not in inside:
                projections[names[module]] = module
            if module is not spec.layer and any("expert" in child for child, _ in module.named_children()):
                mixed.update(module.modules())
    if wanted is None:
        return [name for name, module in projections.items() if module not in mixed]
    matches = {end: [name for name in projections if f".{name}".endswith(f".{end}")] for end in wanted}
    if not all(matches.values()):
        missing = [end for end, found in matches.items() if not found]
        known = sorted({name.rpartition(".")[2] for name in projections})
        raise ConfigError(
            f"adapters.target_modules must name projections of the decoder layers ({', '.join(known)}), got {missing}"
        )
    return [name for found in matches.values() for name in found]


def _refuse_conflicts(model: nn.Module) -> None:
    for layer in filter(_is_tuned, model.modules()):
        tuned: Any = layer
        if tuned.merged:
            raise NotSupported(
                "adapters of your own must not be merged: use unmerge_adapter, or merge_and_unload, before mplus.wrap"
            )
        names = {name for attribute in tuned.adapter_layer_names for name in getattr(tuned, attribute)}
        for name in names.intersection(ADAPTERS):
            raise NotSupported(
                f"an adapter of your own is called {name!r}, as one of mplus: load it under another name"
            )


def _is_tuned(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _path(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
