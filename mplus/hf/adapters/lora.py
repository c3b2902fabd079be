"""The LoRA adapters "write" and "read", switched per pass and never by changing module state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mplus.config import AdapterConfig
from mplus.errors import ConfigError, NotSupported
from mplus.hf.adapters.peft_layers import is_adapter_layer
from mplus.hf.model.modes import execution_device
from mplus.hf.retrofit.context import change_class, current_pass, rebuild, subclass
from mplus.hf.retrofit.discovery import Anatomy

ADAPTERS = ("write", "read")
"""Names of the adapters."""

FACTORS = ("lora_A", "lora_B", "lora_dropout")
"""What a projection with adapters has besides its weight, each by the name of the adapter."""


class LowRankFactor(nn.Module):
    """One factor of a low-rank update, ``[out, in]``.

    It is no ``nn.Linear``, so that PEFT's ``target_modules="all-linear"`` does not adapt it.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]`` in the dtype of the factor."""
        return nn.functional.linear(x.to(self.weight.dtype), self.weight)


class AdaptedProjection:
    """Mixed into the class of a projection: adds the update of the adapter of the current pass.

    These are no layers of PEFT. PEFT cannot tell whose its layers are: it would leave a decoder trainable that has
    some, save our factors with a user's adapter, and drop or disable ours with it. As it is, a decoder with memory is
    to PEFT a decoder without adapters, and what it adds acts besides ours.
    """

    weight: Tensor
    # The names of PEFT, which published checkpoints have as well.
    lora_A: nn.ModuleDict  # noqa: N815
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As without adapters, outside of a pass."""
        result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        active = current_pass()
        if active is None or active.adapter is None:
            return result
        name = active.adapter
        update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return (result + update).to(result.dtype)

    def update_weight(self, name: str) -> Tensor:
        """What the adapter ``name`` adds to the weight, as it lies there."""
        up, down = (self.get_parameter(f"{factor}.{name}.weight") for factor in ("lora_B", "lora_A"))  # type: ignore[attr-defined]
        update: Tensor = up @ down * self.scaling[name]
        return update.T if isinstance(self, Conv1D) else update

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (adapted_class, type(self).__mplus_base__), self.__dict__  # type: ignore[attr-defined]


def adapted_class(base: type) -> type:
    """``base`` with ``AdaptedProjection`` mixed in; it keeps the name, by which quantised layers are known."""
    return subclass(base, AdaptedProjection)


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


def _add(projection: Any, name: str, config: AdapterConfig) -> None:
    if not isinstance(projection, AdaptedProjection):
        for part in FACTORS:
            projection.add_module(part, nn.ModuleDict())
        projection.scaling = {}
        change_class(projection, adapted_class(type(projection)))
    outputs, inputs = _features(projection)
    down, up = nn.Linear(inputs, config.rank, bias=False).weight, nn.Linear(config.rank, outputs, bias=False).weight
    nn.init.kaiming_uniform_(down, a=5**0.5)
    nn.init.zeros_(up)
    weight = projection.weight
    # Next to quantised weights the factors are in full precision.
    dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else torch.float32
    for part, factor in (("lora_A", down), ("lora_B", up)):
        made = LowRankFactor(factor.detach().to(execution_device(projection), dtype))
        projection.get_submodule(part)[name] = made
    projection.lora_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
    projection.scaling[name] = config.alpha / config.rank
    for part in FACTORS:
        projection.get_submodule(part).train(projection.training)


def _features(projection: Any) -> tuple[int, int]:
    """Outputs and inputs; a quantised weight has another shape."""
    if isinstance(projection, Conv1D):
        inputs, outputs = projection.weight.shape
        return outputs, inputs
    return projection.out_features, projection.in_features


def remove_adapters(model: nn.Module) -> None:
    """Undo ``add_adapters``; adapters of the user stay."""
    for projection in adapted_projections(model):
        change_class(projection, type(projection).__mplus_base__)
        for part in FACTORS:
            del projection._modules[part]
        del projection.scaling


def adapted_projections(model: nn.Module) -> list[Any]:
    """The projections in ``model`` that have adapters of ours."""
    return [module for module in model.modules() if isinstance(module, AdaptedProjection)]


def find_targets(model: nn.Module, anatomy: Anatomy, wanted: Sequence[str] | None = None) -> list[nn.Module]:
    """The projections to adapt in the layers that carry memory.

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
    """Raises NotSupported when adapters of the user are merged, or have one of our names."""
    for layer in filter(is_adapter_layer, model.modules()):
        tuned: Any = layer
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
    """What the user's adapters consist of: modules that are no part of the decoder, and copies trained in full."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: set[nn.Module] = set()
    for module in layer.modules():
        if is_adapter_layer(module):
            tuned: Any = module
            decoders_own = set(tuned.base_layer.modules())
            found.update(part for part in module.modules() if part not in decoders_own)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found.update(module.modules())
    return found


def plain_name(name: str) -> str:
    """The name that a tensor has where no adapter of the user's, put there by PEFT, is around its module."""
    return name.replace(".base_layer.", ".")


def is_addition(name: str) -> bool:
    """Whether mplus added the tensor of this name to a decoder."""
    return name.startswith("mplus.") or is_adapter(name)


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to one of our LoRA adapters."""
    return any(f".lora_{part}.{adapter}." in name for part in "AB" for adapter in ADAPTERS)
