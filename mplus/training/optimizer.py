"""Optimiser, learning rates and gradient norms: a group of parameters for each module that a mechanism adds.

The modules are the children of ``model.mplus``, the retriever of M+ among them. Everything else that is trained (LoRA
adapters, the mechanism's parameters that are in no module, the decoder) is one more group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mplus.errors import ConfigError
from mplus.training.parallel import full_tensor
from mplus.training.recipe.tables import Optimizer


def make_optimizer(trained: Mapping[str, nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    """Return AdamW over ``trained`` (name -> parameter), with a group for each module of a mechanism.

    A group has besides AdamW's own options ``module``, its name (the rest: ""), and ``top_rate``, the learning rate at
    the top of the schedule.

    Raises:
        ConfigError: ``learning_rates`` names a module that is not trained.
    """
    modules: dict[str, list[nn.Parameter]] = {"": []}
    for name, parameter in trained.items():
        added, *path = name.split(".")
        module = path[0] if added == "mplus" and len(path) > 1 else ""
        modules.setdefault(module, []).append(parameter)
    for module in options.learning_rates:
        if module not in modules:
            known = ", ".join(map(repr, filter(None, modules))) or "none"
            raise ConfigError(
                f"optimizer: learning_rates must name modules that the mechanism trains ({known}), got {module!r}"
            )
    groups = []
    for module, parameters in modules.items():
        rate = options.rate_of(module)
        if parameters:  # AdamW takes no group without any
            groups.append({"params": parameters, "lr": rate, "top_rate": rate, "module": module})
    return torch.optim.AdamW(groups, betas=options.betas, weight_decay=options.weight_decay)


def make_schedule(options: Optimizer, steps: int) -> Callable[[int, int], float]:
    """Return ``share(done, fallen)``: the share of its top rate that a group has on the next step.

    ``done`` steps were taken in all, and the schedule is at ``fallen`` of its ``steps``.
    """

    def share(done: int, fallen: int) -> float:
        warm = min(1.0, (done + 1) / options.warmup_steps) if options.warmup_steps else 1.0
        progress = min(1.0, fallen / steps)
        kept = {
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
            "constant": 1.0,
        }[options.schedule]
        return warm * (options.floor + (1 - options.floor) * kept)

    return share


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float | None) -> dict[str, float]:
    """Scale the gradient of each group down to norm ``largest`` (None: leave it), and return module -> norm before."""
    norms = {}
    for group in optimizer.param_groups:
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        norm = float(full_tensor(torch.nn.utils.get_total_norm(gradients))) if gradients else 0.0
        if largest is not None and norm > largest:
            for gradient in gradients:
                gradient.mul_(largest / norm)
        norms[group["module"]] = norm
    return norms


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, dict[str, Tensor]]:
    """Return the state of every trained parameter by name, whole where it is sharded. All processes must call it."""
    return {
        names[parameter]: {key: full_tensor(value).detach().cpu() for key, value in state.items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter))
    }
