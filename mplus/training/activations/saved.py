"""Tensors that a decoder layer saved for backward, and the groups of them that are held together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import define, field
from torch import Tensor, nn

from mplus.errors import NotSupported
from mplus.hf.types import Argument
from mplus.training.activations.counter import CountedBytes
from mplus.training.activations.host_copies import HostCopy
from mplus.training.activations.layout import SavedLayout

Source = int | str
"""Where a recomputed tensor comes from: the number of a saved tensor, or a name of an input of attention."""


@define(eq=False)
class Group:
    """Saved tensors that show the same numbers, held once.

    Attributes:
        layout: of the first of them.
        source: of their tokens that are recomputed; None: they are held whole.
        size: bytes of all tokens.
        copy: in host memory, of the first tokens or of everything.
        counted: bytes of this copy.
        restored: everything on the device again, in backward.
    """

    layout: SavedLayout
    source: Source | None
    size: int
    copy: HostCopy | None = None
    counted: CountedBytes | None = None
    restored: Tensor | None = None


@define(eq=False)
class SavedTensor:
    """One tensor that autograd saved, in the place of which it holds this.

    Attributes:
        number: its place among those that a layer saved outside of attention; None: attention saved it.
        layout: of the tensor.
        version: count of in-place changes when it was saved.
        tensor: the tensor itself, until the layer is done, or for as long as it is kept.
        group: what holds its numbers then.
        counted: its bytes where it is kept.
    """

    number: int | None
    layout: SavedLayout
    version: int
    tensor: Tensor | None
    group: Group | None = None
    counted: CountedBytes | None = None

    def need_tensor(self) -> Tensor:
        """Return the tensor. Raises NotSupported where the layer changed it in place after it was saved."""
        assert self.tensor is not None  # noqa: S101  (asked for while it is kept only)
        if self.tensor._version != self.version:  # noqa: SLF001
            raise NotSupported(
                f"a decoder layer changed a tensor {list(self.tensor.shape)} in place that backward needs: leave "
                "activations at 'keep'"
            )
        return self.tensor


@define(frozen=True, eq=False)
class Outliving:
    """Tensors that live longer than a layer's activations: parameters, tables and masks.

    Attributes:
        storages: addresses.
        casts: sizes of weights, of which autocast makes copies that it keeps for itself.
    """

    storages: frozenset[int]
    casts: frozenset[torch.Size] = field(factory=frozenset)

    @staticmethod
    def of(layer: nn.Module, arguments: Argument) -> Outliving:
        """Look at a layer and what it is called with besides hidden states."""
        own = [*layer.parameters(), *layer.buffers()]
        storages = frozenset(t.untyped_storage().data_ptr() for t in (*own, *tensors_in(arguments)))
        device = own[0].device.type if own else "cpu"
        casts = (p.shape for p in own if p.dim() == 2) if torch.is_autocast_enabled(device) else ()
        return Outliving(storages, frozenset(casts))

    def __contains__(self, tensor: Tensor) -> bool:
        base = tensor if tensor._base is None else tensor._base  # noqa: SLF001
        if tensor.untyped_storage().data_ptr() in self.storages or (base.is_leaf and base.requires_grad):
            return True
        # Products save a weight transposed; activations never lie like that.
        return tensor.dim() == 2 and tensor.shape[::-1] in self.casts and tensor.stride(0) == 1


def tensors_in(value: Argument) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def last_tokens(value: Argument, batch: int, tokens: int, first: int) -> Argument:
    """Return a layer's argument for the tokens from ``first`` on: hidden states, positions, cosines and sines."""
    if isinstance(value, Tensor):
        if value.dim() == 1 and value.shape[0] == tokens:
            return value[first:]
        per_token = value.dim() > 1 and value.shape[0] in {1, batch} and value.shape[1] == tokens
        return value[:, first:] if per_token else value
    if isinstance(value, tuple | list):
        return type(value)(last_tokens(part, batch, tokens, first) for part in value)
    if isinstance(value, dict):
        return {name: last_tokens(part, batch, tokens, first) for name, part in value.items()}
    return value
