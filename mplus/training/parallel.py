"""Several processes that train one model: sums over all of them, and parameters that are sharded over them (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


class FsdpPlugin(Protocol):
    """Settings of accelerate for parameters that are sharded."""

    cpu_ram_efficient_loading: bool


class AcceleratorState(Protocol):
    """The part of accelerate's own state that is set here."""

    fsdp_plugin: FsdpPlugin


class Accelerator(Protocol):
    """Places a decoder and wraps it for several processes: ``accelerate.Accelerator``."""

    @property
    def is_fsdp2(self) -> bool: ...
    @property
    def distributed_type(self) -> Enum: ...
    @property
    def state(self) -> AcceleratorState: ...
    def prepare(self, *things: nn.Module | torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]: ...
    def backward(self, loss: Tensor) -> None: ...
    def free_memory(self) -> Sequence[None]: ...


def world_size() -> int:
    """Return the number of processes that train together; 1 where nothing was started to train with others."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all processes to come here."""
    if world_size() > 1:
        distributed.barrier()


def sum_over_processes(values: Iterable[float]) -> list[float]:
    """Return each value summed over all processes."""
    values = list(values)
    if world_size() == 1:
        return values
    # NCCL exchanges what lies on a GPU only.
    nccl = "nccl" in str(distributed.get_backend())
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    # float64, in which counts of tokens stay exact.
    together = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(together)
    return [float(value) for value in together]


def gather_objects(value: T) -> list[T]:
    """Return the plain data of every process, in order of rank."""
    if world_size() == 1:
        return [value]
    found: list[T | None] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return cast("list[T]", found)


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return ``total / count``; among several processes such that their mean is sum of totals / sum of counts.

    Gradients are averaged over processes. With this each stream weighs as much as if one process held all of them,
    also where processes have different numbers of tokens to predict. 0 where nobody has anything.
    """
    if world_size() > 1:
        count = count.to(torch.float64)
        distributed.all_reduce(count)
        count = count / world_size()
    # Times 0 and no constant: backward has to reach the same parameters in every process.
    return total / count.to(total.dtype) if bool(count) else total * 0.0


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of the tensor."""
    from torch.distributed.tensor import DTensor  # takes a second to import: only where somebody trains

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor. All processes must ask for a sharded one at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def shard_like(full: Tensor, target: Tensor) -> Tensor:
    """Return ``full`` sharded over processes as ``target`` is, on its device."""
    if not is_sharded(target):
        return full.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Tensor = distribute_tensor(full.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return sharded
