"""LayerRun: one forward of one decoder layer under hooks that take note of each tensor that autograd saves."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mplus.hf.retrofit.observed import AttentionObserver
from mplus.training.activations.counter import ActivationCounter, CountedBytes
from mplus.training.activations.layer_call import LayerCall, LayerOutput
from mplus.training.activations.layout import SavedLayout
from mplus.training.activations.saved import SavedTensor


class LayerRun(ABC):
    """One forward of one decoder layer. Autograd's graph holds it for as long as it holds a saved tensor.

    Args:
        call: of the layer.
        hidden: ``[B, T, d]`` that it is called with.
        counter: counts bytes held and tokens recomputed.

    Attributes:
        inside: whether attention is being computed, whose saved tensors have no number.
        count: tensors saved outside of attention so far.
    """

    def __init__(self, call: LayerCall, hidden: Tensor, counter: ActivationCounter) -> None:
        self.call, self.counter = call, counter
        self.inside, self.count = False, 0
        self._hidden: Tensor | None = hidden
        self._saved: list[SavedTensor] = []
        self._outliving = call.outliving()

    @property
    def observer(self) -> AttentionObserver | None:
        """Return the observer that stands around attention in the forward; None: none does."""
        return None

    def forward(self) -> LayerOutput:
        """Run the layer on its hidden states ``[B, T, d]``, and take note of what autograd saves."""
        hidden, self._hidden = self._need_hidden(), None
        with saved_tensors_hooks(self._pack, self._unpack):
            output = self.call.run(hidden, self.observer)
        saved, self._saved = self._saved, []
        if saved:
            self.settle(hidden.detach(), saved)
        return output

    def _need_hidden(self) -> Tensor:
        assert self._hidden is not None  # noqa: S101  (a run is run once)
        return self._hidden

    def _pack(self, tensor: Tensor) -> SavedTensor | Tensor:
        number = None
        if not self.inside:
            number = self.count
            self.count += 1
        if not tensor.numel() or tensor in self._outliving:
            return tensor.detach()
        layout = SavedLayout.of(tensor, self.call.batch, self.call.tokens)
        # Without its graph: an output of the node that saves it would hold that node in a cycle.
        saved = SavedTensor(number, layout, tensor._version, tensor.detach())  # noqa: SLF001
        self._saved.append(saved)
        return saved

    def _unpack(self, packed: SavedTensor | Tensor) -> Tensor:
        return packed if isinstance(packed, Tensor) else self.restore(packed)

    @abstractmethod
    def settle(self, hidden: Tensor, saved: list[SavedTensor]) -> None:
        """Decide what becomes of the tensors that the layer saved of ``hidden``, once it is done."""

    @abstractmethod
    def restore(self, saved: SavedTensor) -> Tensor:
        """Return a saved tensor for backward."""


class KeptLayer(LayerRun):
    """A layer whose activations stay where they are, counted."""

    def settle(self, hidden: Tensor, saved: list[SavedTensor]) -> None:
        """Count every storage once."""
        counted: dict[int, CountedBytes] = {}
        for one in saved:
            storage = one.need_tensor().untyped_storage()
            if storage.data_ptr() not in counted:
                counted[storage.data_ptr()] = CountedBytes(self.counter, "device", storage.nbytes())
            one.counted = counted[storage.data_ptr()]

    def restore(self, saved: SavedTensor) -> Tensor:
        """Return the tensor itself."""
        return saved.need_tensor()


class RecomputedLayer(LayerRun):
    """A layer of which the input is kept, and that is run again in backward (gradient checkpointing)."""

    def settle(self, hidden: Tensor, saved: list[SavedTensor]) -> None:
        """Keep the hidden states."""
        self._input = hidden
        self._counted = CountedBytes(self.counter, "device", hidden.nbytes)
        self._wanted = {one.number for one in saved if one.number is not None}
        self._pieces: dict[int, Tensor] = {}
        for one in saved:
            one.tensor = None

    def restore(self, saved: SavedTensor) -> Tensor:
        """Return the tensor of this number, from a second run of the layer."""
        assert saved.number is not None  # noqa: S101  (attention is not set apart here)
        if saved.number not in self._pieces:
            with self.call.random.replayed():
                self._pieces = self.call.again(self._input, None, self._wanted, self.count)
            self.counter.recomputed_tokens += self.call.batch * self.call.tokens
        return self._pieces[saved.number]
