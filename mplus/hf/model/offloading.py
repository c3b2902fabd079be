"""Where a decoder's weights are, and how to get at those that accelerate has offloaded."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mplus.errors import NotSupported


def execution_device(module: nn.Module) -> torch.device:
    """Return the device of a module's weight, or the one accelerate brings it to for a call."""
    device = cast("Tensor", module.weight).device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def input_device(model: nn.Module) -> torch.device:
    """Return the device that input ids go to."""
    return execution_device(cast("PreTrainedModel", model).get_input_embeddings())


def has_values(model: nn.Module) -> bool:
    """Return whether every weight has values, here or where accelerate has put them, and new weights would."""
    new = nn.Module()
    new.register_parameter("weight", nn.Parameter(torch.zeros(1)))  # on the meta device within init_empty_weights
    absent = (module for module in model.modules() if any(p.device.type == "meta" for p in module.parameters(False)))
    return not on_meta(new) and all(hasattr(module, "_hf_hook") for module in absent)


def bring_back(module: nn.Module, what: str) -> None:
    """Undo what accelerate's offloading did to a small module that is used apart from its ``forward``.

    Raises:
        NotSupported: it is on the meta device, and its values are nowhere.
    """
    if not on_meta(module):
        return
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(module)  # which puts the values back where they were
    if on_meta(module):
        raise NotSupported(
            f"{what} is on the meta device, where tensors have no values: load the values (mplus.from_pretrained, or "
            "to_empty and load_state_dict) before anything is written or read"
        )


def value_of(model: nn.Module, name: str) -> Tensor:
    """Return a copy of the parameter or buffer ``name`` that accelerate has offloaded.

    Raises:
        NotSupported: it has no values, here or where accelerate could have put them.
    """
    from accelerate.utils import align_module_device

    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    # The hook of this module alone, so that no more than one layer is brought back at a time.
    with align_module_device(module):
        tensor: Tensor = getattr(module, last)
        if tensor.is_meta:
            raise NotSupported(
                f"{name} is on the meta device, where tensors have no values: load the values (mplus.from_pretrained, "
                "or to_empty and load_state_dict) before anything is saved or loaded"
            )
        return tensor.detach().clone()


def on_meta(module: nn.Module) -> bool:
    """Return whether a parameter or buffer of a module has no values here."""
    return any(tensor.device.type == "meta" for tensor in (*module.parameters(), *module.buffers()))
