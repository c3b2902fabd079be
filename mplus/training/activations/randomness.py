"""Random numbers of a layer that is run again, for all of its tokens or for the last ones only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mplus.errors import NotSupported
from mplus.training.activations.layout import SavedLayout


@define(frozen=True, eq=False)
class RandomState:
    """State of the generators that layers on ``device`` draw from: the CPU's, and that of a GPU.

    Attributes:
        device: where the layer computes.
        states: of these generators.
    """

    device: torch.device
    states: tuple[Tensor, ...]

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """Take the present state."""
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        return RandomState(device, tuple(states))

    def set(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.states[1], self.device)

    def is_like(self, other: RandomState) -> bool:
        """Return whether nothing was drawn between the two."""
        return all(map(torch.equal, self.states, other.states))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw inside what was drawn after this state, and afterwards go on as if nothing had been."""
        before = RandomState.now(self.device)
        try:
            self.set()
            yield
        finally:
            before.set()


class LastTokensDraws(TorchDispatchMode):
    """Makes dropout on the last tokens of texts draw what it drew for them among all tokens.

    Args:
        batch, tokens: of the whole texts.
        first: token with which the last ones begin.

    Raises:
        NotSupported: a layer draws random numbers in another way than dropout does.
    """

    def __init__(self, batch: int, tokens: int, first: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._batch, self._tokens, self._first = batch, tokens, first

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation; one that draws is run for all tokens."""
        named = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **named)
        if func is torch.ops.aten.bernoulli_.float:  # dropout on a CPU
            noise, *others = args
            return noise.copy_(self._drawn(noise, lambda whole: func(whole, *others, **named)))
        if func is torch.ops.aten.native_dropout.default:  # dropout on a GPU
            hidden, p, train = args
            if not train or p in {0, 1}:
                return func(*args, **named)
            mask = self._drawn(hidden, lambda whole: func(whole, p, train, **named)[1])
            return (hidden.float() * mask * (1 / (1 - p))).to(hidden.dtype), mask
        raise NotSupported(
            f"a decoder layer draws random numbers with {func}, which cannot be drawn again for some of its tokens: "
            "use swapped_share 0 or 1, or activations 'recompute' or 'swap'"
        )

    def _drawn(self, part: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what ``draw`` makes of a tensor for all tokens that lies in memory as ``part`` does, of the last."""
        layout = SavedLayout.of(part, self._batch, self._tokens - self._first)
        if layout.blocks is None:
            raise NotSupported(
                f"a decoder layer draws random numbers of shape {list(part.shape)}, in which its tokens cannot be told "
                "from others: use swapped_share 0 or 1, or activations 'recompute' or 'swap'"
            )
        rest = part.numel() // (self._batch * layout.blocks * (self._tokens - self._first))
        whole = draw(part.new_zeros(self._batch, layout.blocks, self._tokens, rest))
        return layout.restore(whole[:, :, self._first :])
