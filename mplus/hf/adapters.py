"""The LoRA adapters "write" and "read", switched per pass and never by changing module state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mplus.config import AdapterConfig
from mplus.errors import ConfigError
from mplus.hf.discovery import Anatomy
from mplus.hf.passes import change_class, current_pass, subclass

OURS = ("write", "read")


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
        return [name for name in names if name not in OURS] + ours

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mplus_base__,), self.__dict__  # type: ignore[attr-defined]


def _rebuild(base: type) -> Any:
    cls = subclass(base, PassAdapter)
    return cls.__new__(cls)


def add_adapters(model: nn.Module, anatomy: Anatomy, config: AdapterConfig) -> None:
    """Inject both adapters (one when ``shared``) into the layers that carry memory; ``requires_grad`` of the rest stays.

    Raises:
        ConfigError: ``target_modules`` matches nothing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = ["write"] if config.shared else ["write", "read"]
    targets = list(config.target_modules) if config.target_modules is not None else find_targets(model, anatomy)
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    for name in names:
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT scales by a float as well
            lora_dropout=config.dropout,
            target_modules=targets,
            fan_in_fan_out=transposed,
        )
        with _without_peft_config(model):
            try:
                inject_adapter_in_model(lora, model, adapter_name=name)
            except ValueError as error:
                raise ConfigError(
                    f"adapters.target_modules must name linear modules of the decoder, got {targets[:8]}: {error}"
                ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(parameter, True))
    for layer in lora_layers(model):
        change_class(layer, subclass(type(layer), PassAdapter))


def remove_adapters(model: nn.Module) -> None:
    """Undo ``add_adapters``; adapters of the user stay."""
    for layer in lora_layers(model):
        change_class(layer, type(layer).__mplus_base__)
        own = [name for name in layer.lora_A if name not in OURS] + [name for name in layer.lora_embedding_A]
        for name in [name for name in layer.lora_A if name in OURS]:
            layer.delete_adapter(name)
        if not own:
            parent, _, child = _path(model, layer).rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def lora_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers in ``model`` that hold one of our adapters."""
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer) and any(name in m.lora_A for name in OURS)]


def find_targets(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Full names of the attention and dense MLP projections of the layers that carry memory.

    Mixture-of-experts blocks are left alone: their routers and experts are no plain projections.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {module: name for name, module in model.named_modules()}
    targets = []
    for spec in anatomy.specs:
        mixtures = [m for m in spec.layer.modules() if any("expert" in child for child, _ in m.named_children())]
        skipped = {m for mixture in mixtures for m in mixture.modules() if mixture is not spec.layer}
        inside = {m for m in spec.layer.modules() if isinstance(m, BaseTunerLayer) for m in m.modules() if not isinstance(m, BaseTunerLayer)}
        for module in spec.layer.modules():
            projects = _is_projection(module) or isinstance(module, BaseTunerLayer)
            if projects and module not in skipped and module not in inside:
                targets.append(names[module])
    return targets


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _path(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


@contextmanager
def _without_peft_config(model: nn.Module) -> Iterator[None]:
    """Injection leaves its own ``peft_config`` on the model, which PEFT and Trainer would take for a user's."""
    own = model.__dict__.pop("peft_config", None)
    try:
        yield
    finally:
        model.__dict__.pop("peft_config", None)
        if own is not None:
            model.__dict__["peft_config"] = own
