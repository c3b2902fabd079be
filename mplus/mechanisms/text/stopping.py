"""Late stopping: a call that is generated ends at the best of several places, not at the first one (MemLLM)."""

from __future__ import annotations

from attrs import define, field


@define
class LateStopping:
    """Places where a generated call could end, and the best of them (MemLLM, arXiv 2404.11672, its released decoding).

    A place is a step at which the mark that closes the call is the most probable token. Its score is the sum of the
    logarithms of all probabilities so far, the mark's included, divided by the number of tokens, those of the prompt
    included. Decoding goes on with the runner-up until there are ``patience`` places and the best of them is not among
    the ``patience - 1`` newest. With a patience of 1 it ends at the first one, as greedy decoding does.

    Example:
        >>> late = LateStopping(prompt=10, patience=1)
        >>> late.step(-0.2, -1.6), late.step(-0.5, -0.9)
        (True, True)
        >>> late.cut
        0

    Attributes:
        prompt: tokens of the prompt.
        patience: places to wait for.
        places: score of each, by the number of tokens in front of it.
    """

    prompt: int
    patience: int
    places: dict[int, float] = field(factory=dict, init=False)
    _total: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def step(self, closing: float, other: float) -> bool:
        """Take one step; return whether decoding is at an end.

        Args:
            closing: log probability of the mark that closes.
            other: of the best other token, with which decoding goes on.
        """
        if closing >= other:
            self.places[self._steps] = (self._total + closing) / max(self.prompt + self._steps, 1)
        self._total += other
        self._steps += 1
        newest = list(self.places)[len(self.places) - (self.patience - 1) :]
        return len(self.places) >= self.patience and self.cut not in newest

    @property
    def cut(self) -> int | None:
        """The place with the best score, the first one among equals; None: there is none."""
        return max(self.places, key=self.places.__getitem__, default=None)
