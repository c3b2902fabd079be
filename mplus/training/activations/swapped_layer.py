"""SwappedLayer: a layer whose activations go to host memory, whole or for a share of the tokens (MEMO, section 3.2).

In backward the first tensor that is asked for brings the others back, and runs the layer once more on the tokens that
were not swapped: what it saves then, in the same order, are the missing pieces. Attention mixes tokens, so it is never
run again: its output is held whole and stands in for it. So is what a memory puts in front of a text, whose keys and
values keep the graph of the rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mplus.errors import NotSupported
from mplus.hf.retrofit.observed import Weighted
from mplus.training.activations.counter import ActivationCounter, CountedBytes
from mplus.training.activations.host_copies import HostCopies
from mplus.training.activations.layer_call import LayerCall
from mplus.training.activations.layer_run import LayerRun
from mplus.training.activations.layout import SavedLayout, StorageKey
from mplus.training.activations.planning import LayerBytes
from mplus.training.activations.randomness import LastTokensDraws, RandomState
from mplus.training.activations.saved import Group, SavedTensor, Source

T = TypeVar("T")


class Budget(Protocol):
    """Says how much of a layer goes to the host, and whether its recomputation was looked at before."""

    @property
    def recomputes(self) -> bool:
        """Return whether a layer's tokens may be recomputed."""

    def swapped(self, index: int, sizes: LayerBytes, tokens: int) -> int:
        """Return the number of a layer's tokens that are swapped. Raises HostMemoryError where the host has no room."""

    def is_checked(self, index: int) -> bool:
        """Return whether a recomputation of this layer gave what the layer had saved; from now on it has."""


class SwappedLayer(LayerRun):
    """A layer whose activations go to host memory; it observes its own attention.

    Args:
        call, hidden, counter: as of ``LayerRun``.
        index: of the layer, from 0.
        copies: makes copies in host memory.
        budget: says how much is swapped.
        before: the swapped layer in front of it, whose activations backward needs next; None: there is none.
    """

    def __init__(
        self,
        call: LayerCall,
        hidden: Tensor,
        counter: ActivationCounter,
        index: int,
        copies: HostCopies,
        budget: Budget,
        before: SwappedLayer | None,
    ) -> None:
        super().__init__(call, hidden, counter)
        self._index, self._copies, self._budget = index, copies, budget
        # Weak: each layer would else hold on to the one before it, and to all that this one holds.
        self._before = None if before is None else weakref.ref(before)
        self._names: dict[StorageKey, tuple[str, SavedLayout]] = {}
        self._given: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._learning: list[bool] = []
        self._drawn: list[RandomState] = []

    # ------------------------------------------------------------ in the forward

    @property
    def observer(self) -> SwappedLayer:
        """Return the layer itself."""
        return self

    def prefix(self, make: Callable[[], T]) -> T:
        """Make what a memory puts in front of the text; what is saved for it is held whole."""
        return self._apart(make)

    def attend(self, attend: Callable[[], Weighted], query: Tensor, key: Tensor, value: Tensor) -> Weighted:
        """Attend; what is saved for it is held whole, but for the text's own queries, keys and values."""
        if self.inside:
            return attend()
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            layout = SavedLayout.of(tensor, self.call.batch, self.call.tokens)
            if layout.blocks is not None:
                self._names[layout.key(tensor)] = f"{name} {len(self._outputs)}", layout
                # An address stands for one tensor for as long as this is held.
                self._given.append(tensor.detach())
        found = self._apart(attend)
        self._outputs.append(found[0].detach())
        self._learning.append(found[0].requires_grad)
        return found

    def _apart(self, function: Callable[[], T]) -> T:
        if self.inside:
            return function()
        self.inside = True
        try:
            return function()
        finally:
            self.inside = False
            self._drawn.append(RandomState.now(self.call.device))

    # ------------------------------------------------------------ after the forward

    def settle(self, hidden: Tensor, saved: list[SavedTensor]) -> None:
        """Begin the copies to the host."""
        outputs, self._outputs = self._outputs, []
        held = HeldTensors(self.call, saved, self._names)
        # What is run again needs the input, and the output of attention, whether they were saved or not.
        self._whole = [held.whole(tensor) for tensor in (hidden, *outputs)] if self._budget.recomputes else []
        tokens = self.call.tokens
        self._first = self._budget.swapped(self._index, held.sizes(hidden.nbytes), tokens)
        self._draws = not RandomState.now(self.call.device).is_like(self.call.random)
        if 0 < self._first < tokens:
            self._check(held, hidden, outputs)
        for group, tensor in held.tensors.values():
            self._copy(group, tensor)
        self._copies.layer_done()
        self._given.clear()
        self._groups = [weakref.ref(group) for group, _ in held.tensors.values()]
        self._wanted = held.numbers()
        self._pieces: dict[Source, Tensor] | None = None

    def _copy(self, group: Group, tensor: Tensor) -> None:
        if group.source is not None:
            tensor = tensor[:, :, : self._first]
        if tensor.numel():
            group.copy = self._copies.copy(tensor)
            group.counted = CountedBytes(self.counter, "host", tensor.nbytes)

    def _check(self, held: HeldTensors, hidden: Tensor, outputs: list[Tensor]) -> None:
        """Recompute the last tokens while all of them are here. Raises NotSupported where something else comes out."""
        if self._budget.is_checked(self._index):
            return
        name = type(self.call.layer).__name__
        if not outputs:
            raise NotSupported(
                f"{name} calls no attention function of transformers, so its tokens cannot be told apart: use "
                "swapped_share 0 or 1, or activations 'recompute' or 'swap'"
            )
        wanted = held.numbers()
        pieces = self._recompute(hidden, outputs, wanted)
        for group, tensor in held.tensors.values():
            if group.source is None:
                continue
            piece, last = pieces[group.source], tensor[:, :, self._first :]
            if not _agree(group.layout.by_token(piece, self.call.batch, last.shape[2]), last):
                raise NotSupported(
                    f"{name} makes something else of the last {last.shape[2]} tokens of a text by themselves than "
                    "among all of them, outside of its attention: use swapped_share 0 or 1, or activations "
                    "'recompute' or 'swap'"
                )

    # ------------------------------------------------------------ in backward

    def restore(self, saved: SavedTensor) -> Tensor:
        """Bring a saved tensor back to its device, with the tokens that are recomputed."""
        group = saved.group
        assert group is not None  # noqa: S101  (every tensor got one when the layer was done)
        if group.restored is None:
            self.prefetch()
            # Backward comes to the layer before next: what it needs travels while this one computes.
            before = None if self._before is None else self._before()
            if before is not None:
                before.prefetch()
            group.restored = self._numbers(group)
        return saved.layout.restore(group.restored)

    def prefetch(self) -> None:
        """Begin to bring everything back."""
        for reference in self._groups:
            group = reference()
            if group is not None and group.copy is not None and group.restored is None:
                self._copies.prefetch(group.copy)

    def _numbers(self, group: Group) -> Tensor:
        there = None if group.copy is None else self._copies.fetch(group.copy)
        if group.source is None or self._first == self.call.tokens:
            assert there is not None  # noqa: S101  (what is held whole was copied)
            return there
        if self._pieces is None:
            inputs, *outputs = (one.layout.restore(self._numbers(one)) for one in self._whole)
            self._pieces = self._recompute(inputs, outputs, self._wanted)
            self.counter.recomputed_tokens += self.call.batch * (self.call.tokens - self._first)
        rest = self.call.tokens - self._first
        last = group.layout.by_token(self._pieces[group.source], self.call.batch, rest)
        return last if there is None else torch.cat([there, last], 2)

    def _recompute(self, hidden: Tensor, outputs: list[Tensor], wanted: set[int]) -> dict[Source, Tensor]:
        """Run the layer on the tokens that were not swapped, and return what it saves of them."""
        call, first = self.call, self._first
        drawn = self._drawn if self._draws else []
        stand_in = AttentionStandIn([output[:, first:] for output in outputs], self._learning, drawn)
        draws = LastTokensDraws(call.batch, call.tokens, first) if self._draws and first else nullcontext()
        # Dropout has to fall as it did: generators are set to what they were, and tokens that are left out draw as
        # well.
        with call.random.replayed() if self._draws else nullcontext(), draws:
            found = call.again(hidden[:, first:].contiguous(), stand_in, wanted, self.count, first)
        pieces: dict[Source, Tensor] = {**stand_in.inputs}
        return pieces | dict(found.items())


class HeldTensors:
    """Saved tensors of one layer, grouped by the numbers they show.

    Args:
        call: of the layer.
        saved: each gets its group.
        names: of the queries, keys and values that attention was given.

    Attributes:
        tensors: each group with its numbers: ``[batch, blocks, tokens, rest]``, or in the order of memory.
    """

    def __init__(
        self, call: LayerCall, saved: list[SavedTensor], names: dict[StorageKey, tuple[str, SavedLayout]]
    ) -> None:
        self._call = call
        self.tensors: dict[StorageKey, tuple[Group, Tensor]] = {}
        for one in saved:
            tensor, one.tensor = one.need_tensor(), None
            key = one.layout.key(tensor)
            one.group = group = self._group(key, one.layout, tensor)
            if group.source is None and group.layout.blocks is not None and one.number is not None:
                group.layout, group.source = one.layout, one.number
            if group.source is None and key in names:
                group.source, group.layout = names[key]

    def _group(self, key: StorageKey, layout: SavedLayout, tensor: Tensor) -> Group:
        if key not in self.tensors:
            by_token = layout.blocks is not None
            numbers = layout.by_token(tensor, self._call.batch, self._call.tokens) if by_token else None
            if numbers is None:
                numbers = layout.in_memory_order(tensor)
            self.tensors[key] = Group(layout, None, numbers.nbytes), numbers
        return self.tensors[key][0]

    def whole(self, tensor: Tensor) -> Group:
        """Return the group of a tensor, which is held whole from now on."""
        layout = SavedLayout.of(tensor, self._call.batch, self._call.tokens)
        group = self._group(layout.key(tensor), layout, tensor)
        group.layout, group.source = layout, None
        return group

    def numbers(self) -> set[int]:
        """Return the numbers of the saved tensors that recomputed tokens come from."""
        return {group.source for group, _ in self.tensors.values() if isinstance(group.source, int)}

    def sizes(self, hidden: int) -> LayerBytes:
        """Return the bytes of the layer's input, which are ``hidden``, of what else is held whole, and of the rest."""
        groups = [group for group, _ in self.tensors.values()]
        others = sum(group.size for group in groups if group.source is not None)
        return LayerBytes(hidden, sum(group.size for group in groups) - others - hidden, others)


class AttentionStandIn:
    """Stands in for attention where a layer is run again: gives what it gave before.

    Args:
        outputs: ``[B, n, H, Dv]`` of each call of attention, for the tokens that are run again.
        learning: whether each of these needs a gradient.
        drawn: state of the generators after each part that is not run again; empty: nothing is drawn.

    Attributes:
        inside: False: whatever is saved was saved outside of attention the first time, too.
        inputs: queries, keys and values by name.
    """

    inside = False

    def __init__(self, outputs: list[Tensor], learning: list[bool], drawn: list[RandomState]) -> None:
        self._outputs, self._learning, self._drawn = outputs, learning, iter(drawn)
        self._calls = 0
        self.inputs: dict[Source, Tensor] = {}

    def prefix(self, make: Callable[[], T]) -> None:
        """Make nothing."""
        self._skip_draws()

    def attend(self, attend: Callable[[], Weighted], query: Tensor, key: Tensor, value: Tensor) -> Weighted:
        """Return the output, and no weights."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            self.inputs[f"{name} {self._calls}"] = tensor.detach()
        output = self._outputs[self._calls].detach().contiguous().requires_grad_(self._learning[self._calls])
        self._calls += 1
        self._skip_draws()
        return output, None

    def _skip_draws(self) -> None:
        state = next(self._drawn, None)
        if state is not None:
            state.set()


def _agree(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal but for rounding, which products of fewer rows do otherwise."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    largest = float(other.abs().max()) if other.numel() else 0.0
    # Half of the digits of the dtype: far more than rounding takes, far less than other numbers differ by.
    allowed = float(torch.finfo(one.dtype).eps ** 0.5) * max(largest, 1e-30)
    return float((one - other).abs().max()) <= allowed
