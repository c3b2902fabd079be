"""The LoRA adapters "write" and "read", switched per pass and never by changing module state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mplus.config import AdapterConfig
from mplus.errors import ConfigError, NotSupported
from mplus.hf.adapters.peft_layers import is_adapter_layer
from mplus.hf.model.offloading import execution_device
from mplus.hf.retrofit.context import change_class, current_pass, subclass
from mplus.hf.retrofit.discovery import Anatomy

if TYPE_CHECKING:
    from torch.nn import Linear as Projection
else:
    Projection = object  # the class that is adapted brings its own

ADAPTERS = ("write", "read")
"""Names of our adapters."""

FACTORS = ("lora_A", "lora_B", "lora_dropout")
"""Modules that a projection with adapters has besides its weight; each holds one part per adapter."""


class LowRankFactor(nn.Module):
    """One factor of a low-rank update, ``[out, in]``.

    It is no ``nn.Linear``, so that PEFT's ``target_modules="all-linear"`` does not adapt it.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the dtype of the factor."""
        return nn.functional.linear(x.to(self.weight.dtype), self.weight)


class AdaptedProjection(Projection):
    """A projection, linear or ``Conv1D``, that adds the update of the adapter of the current pass.

    These are no layers of PEFT. PEFT cannot tell whose its layers are: it would leave a decoder trainable that has
    some, save our factors with a user's adapter, and drop or disable ours with it. As it is, a decoder with memory is
    to PEFT a decoder without adapters, and what it adds acts besides ours.
    """

    __mplus_base__: ClassVar[type]
    # The names of PEFT, which published checkpoints have as well.
    lora_A: nn.ModuleDict  # noqa: N815
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:  # type: ignore[override]
        """Project ``[..., in]`` to ``[..., out]``; outside of a pass as without adapters."""
        active = current_pass()
        if active is not None and active.merged and self in active.merged:
            merged: Tensor = active.merged[self].forward(x, *args, **kwargs)
            return merged
        result: Tensor = super().forward(x, *args, **kwargs)
        if active is None or active.adapter is None:
            return result
        name = active.adapter
        update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return (result + update).to(result.dtype)

    def update_weight(self, name: str) -> Tensor:
        """Return the update of the adapter ``name``, of the shape ``[out, in]`` or ``[in, out]`` of the weight."""
        up, down = (self.get_parameter(f"{factor}.{name}.weight") for factor in ("lora_B", "lora_A"))
        update: Tensor = up @ down * self.scaling[name]
        return update.T if isinstance(self, Conv1D) else update


def add_adapters(model: nn.Module, anatomy: Anatomy, config: AdapterConfig) -> None:
    """Put both adapters (one when ``shared``) on the projections of the layers that carry memory.

    Adapters of the user stay as they are; ours lie on the projection inside of theirs.

    Raises:
        ConfigError: ``target_modules`` names something that is no projection of these layers.
        NotSupported: adapters of the user are merged, or have one of our names.
    """
    refuse_conflicts(model)
    targets = find_targets(model, anatomy, config.target_modules)
    for name in ["write"] if config.shared else ["write", "read"]:
        for projection in targets:
            _add(projection, name, config)


def _add(module: nn.Module, name: str, config: AdapterConfig) -> None:
    projection = cast("AdaptedProjection", module)
    if not isinstance(module, AdaptedProjection):
        for part in FACTORS:
            projection.add_module(part, nn.ModuleDict())
        projection.scaling = {}
        change_class(projection, subclass(type(projection), AdaptedProjection))
    # Not by the shape of the weight where that is quantised: it has another one.
    convolution = isinstance(module, Conv1D)
    inputs, outputs = projection.weight.shape if convolution else (projection.in_features, projection.out_features)
    down, up = nn.Linear(inputs, config.rank, bias=False).weight, nn.Linear(config.rank, outputs, bias=False).weight
    nn.init.kaiming_uniform_(down, a=5**0.5)
    # As in LoRA: with one factor of zeros a new adapter changes nothing.
    nn.init.zeros_(up)
    weight = projection.weight
    # Next to quantised weights the factors are in full precision.
    dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else torch.float32
    for part, factor in (("lora_A", down), ("lora_B", up)):
        made = LowRankFactor(factor.detach().to(execution_device(projection), dtype))
        cast("nn.ModuleDict", projection.get_submodule(part))[name] = made
    projection.lora_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
    projection.scaling[name] = config.alpha / config.rank
    for part in FACTORS:
        # New modules are in training mode, whatever mode the decoder is in.
        projection.get_submodule(part).train(projection.training)


def remove_adapters(model: nn.Module) -> None:
    """Undo ``add_adapters``; adapters of the user stay."""
    for projection in adapted_projections(model):
        change_class(projection, type(projection).__mplus_base__)
        for part in FACTORS:
            del projection._modules[part]
        del projection.scaling


def adapted_projections(model: nn.Module) -> list[AdaptedProjection]:
    """Return the projections in ``model`` that have adapters of ours."""
    return [module for module in model.modules() if isinstance(module, AdaptedProjection)]


def find_targets(model: nn.Module, anatomy: Anatomy, wanted: Sequence[str] | None = None) -> list[nn.Module]:
    """Find the projections to adapt in the layers that carry memory.

    Args:
        wanted: ends of names; None: attention and dense MLPs. Mixture-of-experts blocks are then left alone: their
            routers and experts are no plain projections.

    Raises:
        ConfigError: one of ``wanted`` matches nothing.
    """
    names = {module: name.replace(".base_layer", "") for name, module in model.named_modules()}
    projections: dict[str, nn.Module] = {}
    mixed: set[nn.Module] = set()
    for spec in anatomy.specs:
        foreign = _parts_of_peft(spec.layer)
        for module in spec.layer.modules():
            if isinstance(module, nn.Linear | Conv1D) and module not in foreign:
                projections[names[module]] = module
            if module is not spec.layer and any("expert" in child for child, _ in module.named_children()):
                mixed.update(module.modules())
    if wanted is None:
        return [module for module in projections.values() if module not in mixed]
    matches = {end: [name for name in projections if f".{name}".endswith(f".{end}")] for end in wanted}
    if not all(matches.values()):
        missing = [end for end, found in matches.items() if not found]
        known = sorted({name.rpartition(".")[2] for name in projections})
        raise ConfigError(
            f"adapters.target_modules must name projections of the decoder layers ({', '.join(known)}), got {missing}"
        )
    chosen = {name for found in matches.values() for name in found}
    return [module for name, module in projections.items() if name in chosen]


def refuse_conflicts(model: nn.Module) -> None:
    """Raise NotSupported when adapters of the user are merged, or have one of our names."""
    for tuned in filter(is_adapter_layer, model.modules()):
        if tuned.merged:
            raise NotSupported(
                "adapters of your own must not be merged for this: use unmerge_adapter, or merge_and_unload, first"
            )
        names = {name for attribute in tuned.adapter_layer_names for name in getattr(tuned, attribute)}
        for name in names.intersection(ADAPTERS):
            raise NotSupported(
                f"an adapter of your own is called {name!r}, as one of mplus: load it under another name"
            )


def _parts_of_peft(layer: nn.Module) -> set[nn.Module]:
    """Return the modules of the user's adapters: those that are no part of the decoder, and copies trained in full."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: set[nn.Module] = set()
    for module in layer.modules():
        if is_adapter_layer(module):
            decoders_own = set(module.get_submodule("base_layer").modules())
            found.update(part for part in module.modules() if part not in decoders_own)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found.update(module.modules())
    return found


def plain_name(name: str) -> str:
    """Return the name that a tensor has where no adapter of the user's, put there by PEFT, is around its module."""
    return name.replace(".base_layer.", ".")


def is_addition(name: str) -> bool:
    """Return whether mplus added the tensor of this name to a decoder."""
    return name.startswith("mplus.") or is_adapter(name)


def is_adapter(name: str) -> bool:
    """Return whether a tensor of this name belongs to one of our LoRA adapters."""
    return any(f".lora_{part}.{adapter}." in name for part in "AB" for adapter in ADAPTERS)
