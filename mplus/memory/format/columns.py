"""The form of rows and tensors: which columns a layout has, of which dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.stores.base import StoreLayout

OPTIONAL = frozenset({"key", "expiry"})
"""Columns that rows of a layout that has them may lack."""


def check_columns(columns: Mapping[str, Tensor], layout: StoreLayout, where: str) -> None:
    """Raise MemoryMismatchError unless these are the columns of rows.

    ``OPTIONAL`` ones, and the further ones of a layout (``StoreLayout.extra``), may be there or not: those rows that go
    into the store must have the latter.

    Args:
        columns: by name.
        layout: of the rows.
        where: they are, in messages.
    """
    described = layout.columns()
    optional = OPTIONAL | {name for name, _, _ in layout.extra}
    if not described.keys() - optional <= columns.keys() <= described.keys():
        raise MemoryMismatchError(f"{where} must have the columns {sorted(described)}, got {sorted(columns)}")
    count = columns["birth"].shape[:1] or (0,)
    for name, column in columns.items():
        shape, dtype = described[name]
        if column.dtype != dtype or column.shape != (*count, *shape):
            raise MemoryMismatchError(
                f"{where}: column {name!r} must be {dtype} {[*count, *shape]}, got {column.dtype} {list(column.shape)}"
            )


def forms(tensors: Mapping[str, Tensor], leave_out: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor, but for its first ``leave_out`` dimensions."""
    return {name: (tensor.dtype, tuple(tensor.shape[leave_out:])) for name, tensor in sorted(tensors.items())}
