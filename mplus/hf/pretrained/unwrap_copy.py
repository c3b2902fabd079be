"""The decoder inside a wrapped one: same tensors, no memory and no adapters. It is there to be saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

from attrs import define, field
from torch import Tensor, nn
from transformers import PreTrainedModel

from mplus.hf.adapters.lora import FACTORS, AdaptedProjection
from mplus.hf.adapters.peft_layers import is_peft_module
from mplus.hf.model.installed import WrappedModel


@define
class PlainTree:
    """A copy of a tree of modules that shares all tensors and has no adapters, neither a user's nor ours.

    Attributes:
        places: by path of a copied module in the original tree, its path in the copy, and the original module.
        copies: the copies, by original module.
    """

    places: dict[str, tuple[str, nn.Module]] = field(factory=dict)
    copies: dict[nn.Module, nn.Module] = field(factory=dict)

    def copy(self, module: nn.Module, path: str = "", plain_path: str = "") -> nn.Module:
        """Copy ``module``, which is called ``path`` in the original tree and ``plain_path`` in the copy."""
        for inner in ("base_layer", "original_module"):  # below PEFT's adapted modules, and those it trains in full
            if inner in module._modules and is_peft_module(module):
                return self.copy(module.get_submodule(inner), f"{path}.{inner}", plain_path)
        self.places[path] = (plain_path, module)
        if module not in self.copies:
            cls = getattr(type(module), "__mplus_base__", type(module))
            twin = self.copies[module] = cls.__new__(cls)
            twin.__dict__.update(module.__dict__)
            added = (*FACTORS, "scaling") if isinstance(module, AdaptedProjection) else ()
            for name in added:
                twin.__dict__.pop(name, None)
            twin.__dict__["_modules"] = {
                name: None if child is None else self.copy(child, _join(path, name), _join(plain_path, name))
                for name, child in module._modules.items()
                if _join(path, name) != "mplus" and name not in added
            }
        return self.copies[module]

    def plain_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a state dict of the original tree that the copy has, by their names there."""
        result = {}
        for name, tensor in state.items():
            path, _, rest = name.rpartition(".")
            while path and path not in self.places:  # a quantised weight has further entries below its name
                path, _, part = path.rpartition(".")
                rest = _join(part, rest)
            if path in self.places:
                plain_path, module = self.places[path]
                if rest.split(".")[0] in (*module._parameters, *module._buffers):
                    result[_join(plain_path, rest)] = tensor
        return result


def plain_decoder(model: WrappedModel) -> tuple[PreTrainedModel, PlainTree]:
    """Return the decoder inside ``model`` and the tree it was copied from. It shares all tensors; do not run it."""
    tree = PlainTree()
    decoder = cast("PreTrainedModel", tree.copy(model))
    for name in ("mplus_engine", "mplus_installed", "peft_config"):
        decoder.__dict__.pop(name, None)
    decoder._hf_peft_config_loaded = False
    decoder.config = copy.deepcopy(model.config)
    decoder.config._attn_implementation = model.mplus_installed.base_attention
    return decoder, tree


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
