"""Ask: what a memory of text can ask the decoder for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Ask(Protocol):
    """The decoder itself, without memory."""

    def __call__(
        self, prompt: str, tokens: int, stop: Sequence[str] = (), choices: Sequence[str] = (), patience: int = 1
    ) -> str:
        """Return what greedy decoding puts behind ``prompt``; see ``mplus.mechanisms.decoder.Decoder.ask``.

        Args:
            prompt, tokens, stop, choices: as there.
            patience: with more than 1, the answer ends at the best of several places where the first text of ``stop``
                could stand; see ``LateStopping``.
        """

    def count(self, text: str) -> int:
        """Return the tokens of a text, special ones left out."""

    def vectors(self, texts: Sequence[str], layer: int) -> Tensor:
        """Return ``[n, d]`` float32, for each text the mean over its tokens of the hidden states behind a layer.

        Args:
            texts: each with at least one token.
            layer: 0 for the input embeddings, else the number of layers that were gone through.

        Raises InputError: there is no such layer, a text has no tokens, or more than the decoder has positions.
        """
