"""The write pass of M+ (section 3.1): ``[begin | newest rows | text]``, of which the last outputs are new rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.backends.base import Segment
from mplus.mechanisms.additions import MemoryAdditions
from mplus.mechanisms.decoder import Decoder, Project, Rows


@define(frozen=True, eq=False)
class WritePlan:
    """Which memory rows a write pass reads.

    Attributes:
        begin: put the begin row in front.
        context: per layer ``[c, d]``, the newest rows to read, oldest first; of several streams ``[B, c, d]``.
        reencoded: how many of the newest context rows are queries too (chunk shorter than K).
        rows: how many new rows the pass makes.
        overlap: layers hand on their new rows with the next layer's mark already added (published MemoryLLM only).
    """

    begin: bool
    context: tuple[Tensor, ...]
    reencoded: int
    rows: int
    overlap: bool = False

    @staticmethod
    def together(plans: Sequence[WritePlan]) -> WritePlan:
        """Return the plans of several streams, equal in all sizes, as one."""
        first = plans[0]
        layers = range(len(first.context))
        context = tuple(torch.stack([plan.context[layer] for plan in plans]) for layer in layers)
        return WritePlan(first.begin, context, first.reencoded, first.rows, first.overlap)

    @property
    def prefix_rows(self) -> int:
        """Rows in front of the text: all that are read, without those that are queries themselves."""
        return int(self.begin) + self.context[0].shape[-2] - self.reencoded


@define(frozen=True, eq=False)
class WritePass:
    """One write pass over a chunk of B streams.

    Attributes:
        plan: of all streams.
        additions: begin rows and mark.
    """

    plan: WritePlan
    additions: MemoryAdditions

    def run(self, decoder: Decoder, ids: Tensor) -> tuple[Tensor, ...]:
        """Return per layer ``[B, k, d]`` the rows made of ids ``[B, n]``. Gradients flow where they are enabled."""
        plan, old = self.plan, self.plan.reencoded
        batch, tokens = ids.shape
        text, positions = ids, None
        if old:
            embedded = decoder.embed(ids)
            text = torch.cat([embedded.new_zeros(batch, old, embedded.shape[-1]), embedded], 1)
            if decoder.shape.positions == "learned":
                positions = torch.cat([ids.new_zeros(old), torch.arange(tokens, device=ids.device)])
        found = decoder.run(
            text,
            prefix=self.prefix,
            prefix_rows=plan.prefix_rows,
            edit=self._marked,
            adapter="write",
            positions=positions,
            mask=torch.ones(batch, old + tokens, dtype=torch.int64, device=ids.device),
            collect={"outputs"},
            last=plan.rows,
        )
        if not plan.overlap:
            return found.outputs
        mark = self.additions.mark
        return (*(rows + mark.to(rows) for rows in found.outputs[:-1]), found.outputs[-1])

    def prefix(self, layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        """Return ``[begin | context]`` without the rows that are queries themselves."""
        context = self.plan.context[layer]
        context = context[:, : context.shape[1] - self.plan.reencoded].to(hidden)
        if not self.plan.begin:
            return (project(Rows(context)),) if context.shape[1] else ()
        begin = self.additions.begin[layer].to(hidden).expand(context.shape[0], -1, -1)
        return (project(Rows(torch.cat([begin, context], 1))),)

    def _marked(self, layer: int, hidden: Tensor) -> Tensor:
        """Put re-encoded rows in the first places of the text, and add the mark to the last rows."""
        old = self.plan.reencoded
        if old:
            context = self.plan.context[layer]
            rows = context[:, context.shape[1] - old :].to(hidden)
            hidden = torch.cat([rows, hidden[:, old:]], 1)
        split = hidden.shape[1] - self.plan.rows
        return torch.cat([hidden[:, :split], hidden[:, split:] + self.additions.mark.to(hidden)], 1)
