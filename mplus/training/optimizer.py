"""Optimiser, learning rates and gradient norms of two groups: the retriever, and everything else that is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mplus.hf.decoders.train_model import is_of_retriever
from mplus.training.parallel import full_tensor
from mplus.training.recipe.tables import Optimizer


def make_optimizer(trained: Mapping[str, nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    """AdamW over ``trained``, with the retriever in a group of its own, where there is one."""
    retriever = [parameter for name, parameter in trained.items() if is_of_retriever(name)]
    rest = [parameter for name, parameter in trained.items() if not is_of_retriever(name)]
    rate = options.learning_rate
    own = rate if options.retriever_learning_rate is None else options.retriever_learning_rate
    groups = [{"params": rest, "lr": rate, "top_rate": rate}, {"params": retriever, "lr": own, "top_rate": own}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=rate, betas=options.betas, weight_decay=options.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Set every group to ``share`` of its top rate; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["top_rate"] * share
    return float(optimizer.param_groups[0]["lr"])


def make_schedule(options: Optimizer, steps: int) -> Callable[[int, int], float]:
    """``share(done, fallen)``: share of the top rate for the step after ``done`` steps in all, when the schedule is at
    ``fallen`` of its ``steps``.
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


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float | None) -> list[float]:
    """Scale the gradient of each group down to norm ``largest`` (None: leave it), and return the norms before."""
    norms = []
    for group in optimizer.param_groups:
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        if not gradients:
            norms.append(0.0)
            continue
        norm = float(full_tensor(torch.nn.utils.get_total_norm(gradients)))
        if largest is not None and norm > largest:
            for gradient in gradients:
                gradient.mul_(largest / norm)
        norms.append(norm)
    return norms


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, dict[str, Any]]:
    """Return the state of every trained parameter by name, whole where it is sharded. All processes must call it."""
    return {
        names[parameter]: {
            key: full_tensor(value).detach().cpu() if isinstance(value, torch.Tensor) else value
            for key, value in state.items()
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter))
    }
