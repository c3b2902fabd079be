"""Repeat: the chunks themselves are to be said again."""

from __future__ import annotations

from typing import ClassVar

from mplus.training.objectives.single_context import SingleContext


class Repeat(SingleContext):
    """As ``single_context``, with texts that ask for the chunks word by word (released code: 10 % of the samples).

    Gradients: as ``single_context``. It pushes towards storage without loss.
    """

    name: ClassVar[str] = "repeat"
    repeats: ClassVar[bool] = True
