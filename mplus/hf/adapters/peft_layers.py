"""PEFT's layers in a decoder: the tensors that each adapter has there, and which adapters act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from attrs import define, field
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    class PeftLayer(BaseTunerLayer, nn.Module):
        """A layer of PEFT's as it stands in a decoder."""

    PeftModule = PeftLayer | AuxiliaryTrainingWrapper


@define(frozen=True, eq=False)
class AdaptedLayer:
    """A module of PEFT's, with the tensors and facts of each adapter in it.

    Attributes:
        module: the layer, or PEFT's wrapper around a module that is trained and saved as a whole.
        path: its name in the decoder.
        parts: by adapter, its tensors there, each with a name.
        facts: by adapter, its settings there as text (``r=8``).
        projects, keys: whether memory rows, and retriever keys, go through it.
    """

    module: PeftModule
    path: str
    parts: Mapping[str, Sequence[tuple[str, Tensor]]] = field(repr=False)
    facts: Mapping[str, Sequence[str]] = field(repr=False)
    projects: bool
    keys: bool

    def acting(self, wanted: tuple[str, ...] | None) -> list[str]:
        """Return the adapters of the user that act here, of those ``wanted`` (None: of those that are active)."""
        if self.module._disable_adapters:
            return []
        return [name for name in (active(self.module) if wanted is None else wanted) if name in self.parts]


def active(layer: PeftModule) -> list[str]:
    """Return the adapters that are switched on in one of PEFT's layers, whatever pass this is."""
    chosen = layer._active_adapter
    return [chosen] if isinstance(chosen, str) else list(chosen)


def is_adapter_layer(module: nn.Module) -> TypeGuard[PeftLayer]:
    """Return whether ``module`` is one of PEFT's layers: an adapter of the user around a module of the decoder."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_peft_module(module: nn.Module) -> TypeGuard[PeftModule]:
    """Return whether PEFT put ``module`` around another: as an adapter layer, or to train and save it as a whole."""
    return hasattr(type(module), "adapter_layer_names")


def adapted_layer(module: PeftModule, path: str, projects: bool, keys: bool) -> AdaptedLayer:
    """Describe one of PEFT's modules; the arguments are those of ``AdaptedLayer``."""
    facts: dict[str, list[str]] = {}
    for attribute, name, value in _entries(module):
        if isinstance(value, bool | int | float | str) and attribute != "scaling":
            facts.setdefault(name, []).append(f"{attribute}={value!r}")
    return AdaptedLayer(module, path.replace(".base_layer", ""), adapter_parts(module), facts, projects, keys)


def adapter_parts(module: PeftModule) -> dict[str, list[tuple[str, Tensor]]]:
    """Return the tensors of each adapter in one of PEFT's modules, with their names there."""
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for attribute, name, value in _entries(module):
        if isinstance(value, nn.Module):
            inner = [*value.named_parameters(), *value.named_buffers()]
            parts.setdefault(name, []).extend((f"{attribute}.{inside}", tensor) for inside, tensor in inner)
        elif isinstance(value, Tensor):
            parts.setdefault(name, []).append((attribute, value))
    return parts


def _entries(module: PeftModule) -> Iterator[tuple[str, str, nn.Module | Tensor | bool | float | str]]:
    """Yield the entries of PEFT's tables by adapter: attribute, adapter, and a module, tensor or setting."""
    for attribute in (*module.adapter_layer_names, *module.other_param_names):
        if "." in attribute:  # it belongs to a layer inside, which comes by itself
            continue
        table: nn.ModuleDict | Mapping[str, bool | float | str] = getattr(module, attribute, {})
        for name in list(table.keys()) if hasattr(table, "keys") else ():
            yield attribute, name, table[name]
