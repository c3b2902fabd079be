"""Parameters that are spread over processes (FSDP2), seen as wholes."""

from __future__ import annotations

import torch
from torch import Tensor


def _sharded() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return isinstance(tensor, _sharded())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a sharded one all processes must ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, _sharded()) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def like(full: Tensor, target: Tensor) -> Tensor:
    """``full`` spread over processes as ``target`` is, and on its device."""
    if not isinstance(target, _sharded()):
        return full.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Tensor = distribute_tensor(full.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return sharded
