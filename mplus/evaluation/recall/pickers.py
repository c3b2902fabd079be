"""Baselines for what brings long-term rows back."""

from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from mplus.training.long_term import LongTermRows


@define(frozen=True, eq=False)
class RandomPicker:
    """Any rows, whatever the text says; the floor."""

    generator: torch.Generator = field(factory=lambda: torch.Generator().manual_seed(0))

    def pick(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """See ``mplus.training.picking.Picker``."""
        drawn = torch.rand(*text.shape[:2], ltm.count, generator=self.generator).to(text.device)
        best = drawn.topk(count, dim=2)
        return best.indices, best.values


@define(frozen=True, eq=False)
class RecencyPicker:
    """The rows written last."""

    def pick(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """See ``mplus.training.picking.Picker``."""
        best = ltm.birth.topk(count, dim=1)
        each = text.shape[1]
        return best.indices[:, None].expand(-1, each, -1), best.values.to(text.dtype)[:, None].expand(-1, each, -1)


@define(frozen=True, eq=False)
class OraclePicker:
    """The rows that were written from what a text is about, then any others; the ceiling. It needs the labels.

    Attributes:
        about: ``[B, R]`` int64, the source each text is about.
    """

    about: Tensor
    generator: torch.Generator = field(factory=lambda: torch.Generator().manual_seed(0))

    def pick(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """See ``mplus.training.picking.Picker``."""
        asked = (ltm.source[:, None] == self.about[:, :, None]).to(text.dtype)
        drawn = torch.rand(asked.shape, generator=self.generator).to(text.device)
        best = (asked + drawn / 2).topk(count, dim=2)
        return best.indices, best.values
