"""The write pass of M+ (section 3.1): ``[begin | newest rows | text]``, of some of whose tokens new rows are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from attrs import define
from torch import Tensor

from mplus.backends.base import Segment
from mplus.mechanisms.additions import MemoryAdditions
from mplus.mechanisms.decoder import Decoder, Project, Rows

MadeOf = Literal["outputs", "inputs"]
"""What the rows of a layer are made of."""

MadeFrom = Literal["last", "even", "unlikely"]
"""Which tokens of a chunk leave rows."""

Drop = Literal["random", "oldest"]
"""Which rows leave a full STM."""


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


def plan_write(newest: Sequence[Tensor], tokens: int, k: int, *, reencode: bool) -> WritePlan:
    """Return the plan of a write of ``tokens`` text tokens that makes K = ``k`` rows (M+ section 3.1).

    Args:
        newest: per layer ``[..., n, d]``, hidden states of the newest short-term rows, oldest first; K are read.
        tokens: of the chunk.
        k: rows of a full chunk.
        reencode: a chunk shorter than K has its newest old rows for queries too, so that there are K new rows; False:
            it makes only as many rows as it has tokens.
    """
    present = min(k, *(hidden.shape[-2] for hidden in newest))
    context = tuple(hidden[..., hidden.shape[-2] - present :, :] for hidden in newest)
    reencoded = min(max(k - tokens, 0), present) if reencode else 0
    return WritePlan(begin=True, context=context, reencoded=reencoded, rows=min(k, tokens + reencoded))


def split_order(order: Tensor, excess: int) -> tuple[Tensor, Tensor]:
    """Return the positions that stay and the ``excess`` that leave, both ascending.

    The last of a random order leave: uniform random drop (MemoryLLM section 3.1.2).

    Args:
        order: ``[..., n]`` int64, a permutation of 0..n-1.
        excess: how many leave.
    """
    count = order.shape[-1] - excess
    return order[..., :count].sort(-1).values, order[..., count:].sort(-1).values


def oldest_last(rows: int, excess: int) -> Tensor:
    """Return ``[rows]`` int64, the order of rows, oldest first, for ``split_order`` by which the oldest leave."""
    return torch.arange(rows).roll(-excess)


def assemble(begin: Tensor | None, parts: Sequence[Tensor | None], like: Tensor, batch: tuple[int, ...] = ()) -> Tensor:
    """Return ``[*batch, P, d]``: ``[begin | retrieved | short-term]`` rows as they stand in front of a text (M+ 3.3).

    Device and dtype are those of ``like``.

    Args:
        begin: ``[1, d]``, the begin row of the layer; None: there is none in front of these rows.
        parts: ``[*batch, n_i, d]``, oldest first; None stands for no rows.
        like: gives device and dtype.
        batch: the dimensions in front of those of one stream.
    """
    rows = [part.to(like) for part in parts if part is not None]
    if begin is not None:
        rows.insert(0, begin.to(like).expand(*batch, -1, -1) if batch else begin.to(like))
    return rows[0] if len(rows) == 1 else torch.cat(rows, -2)


@define(frozen=True, eq=False)
class WritePass:
    """One write pass over a chunk of B streams.

    Attributes:
        plan: of all streams.
        additions: begin rows and mark.
        made_of: what a row is: what the layer gives for its token ("outputs"), or what it receives ("inputs").
        made_from: the tokens that rows are made of: the "last" ones (M+ section 3.1), ones at "even" distances, or the
            most "unlikely" ones.
    """

    plan: WritePlan
    additions: MemoryAdditions
    made_of: MadeOf = "outputs"
    made_from: MadeFrom = "last"

    def run(self, decoder: Decoder, ids: Tensor) -> tuple[Tensor, ...]:
        """Return per layer ``[B, k, d]`` the rows made of ids ``[B, n]``. Gradients flow where they are enabled."""
        plan, old = self.plan, self.plan.reencoded
        batch, tokens = ids.shape
        text, positions = ids, None
        if old:
            embedded = decoder.embed(ids)
            # Places for the re-encoded rows, which ``_marked`` fills in every layer.
            text = torch.cat([embedded.new_zeros(batch, old, embedded.shape[-1]), embedded], 1)
            if decoder.shape.positions == "learned":
                # A learned position would be added to zeros that are then replaced: any one will do.
                positions = torch.cat([ids.new_zeros(old), torch.arange(tokens, device=ids.device)])
        found = decoder.run(
            text,
            prefix=self.prefix,
            prefix_rows=plan.prefix_rows,
            edit=self._marked,
            adapter="write",
            positions=positions,
            mask=torch.ones(batch, old + tokens, dtype=torch.int64, device=ids.device),
            collect={self.made_of, "logits"} if self.made_from == "unlikely" else {self.made_of},
            last=plan.rows if self.made_from == "last" else None,
        )
        made = found.inputs if self.made_of == "inputs" else found.outputs
        if self.made_from == "even":
            places = even_places(old + tokens, plan.rows).to(ids.device)
            made = tuple(rows[:, places] for rows in made)
        elif self.made_from == "unlikely" and plan.rows < tokens:
            places = unlikely_places(found.need_logits(), ids, plan.rows)[..., None]
            made = tuple(rows.gather(1, places.expand(-1, -1, rows.shape[-1])) for rows in made)
        if not plan.overlap:
            return made
        mark = self.additions.mark
        return (*(rows + mark.to(rows) for rows in made[:-1]), made[-1])

    def prefix(self, layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        """Return ``[begin | context]`` without the rows that are queries themselves."""
        context = self.plan.context[layer]
        context = context[:, : context.shape[1] - self.plan.reencoded]
        begin = self.additions.begin[layer] if self.plan.begin else None
        rows = assemble(begin, [context], hidden, batch=context.shape[:1])
        return (project(Rows(rows)),) if rows.shape[1] else ()

    def _marked(self, layer: int, hidden: Tensor) -> Tensor:
        """Put re-encoded rows in the first places of the text, and add the mark where rows are made."""
        old = self.plan.reencoded
        if old:
            context = self.plan.context[layer]
            rows = context[:, context.shape[1] - old :].to(hidden)
            hidden = torch.cat([rows, hidden[:, old:]], 1)
        mark = self.additions.mark.to(hidden)
        if self.made_from == "unlikely":
            return hidden + mark  # which tokens these are is known only when the pass is done
        if self.made_from == "even":
            marked = hidden.new_zeros(hidden.shape[1], 1)
            marked[even_places(hidden.shape[1], self.plan.rows)] = 1
            return hidden + marked * mark
        split = hidden.shape[1] - self.plan.rows
        return torch.cat([hidden[:, :split], hidden[:, split:] + mark], 1)


def even_places(tokens: int, rows: int) -> Tensor:
    """Return ``[rows]`` int64: places among ``tokens`` at distances that differ by at most one, ending with the last.

    Example:
        >>> even_places(8, 3).tolist()
        [1, 4, 7]
    """
    return torch.arange(1, rows + 1) * tokens // rows - 1


@torch.no_grad()
def unlikely_places(logits: Tensor, ids: Tensor, rows: int) -> Tensor:
    """Return ``[B, rows]`` int64, ascending: the places of the first token and of those that were least to be expected.

    What a decoder expects anyway it can fill in when it reads (Selective Context, arXiv 2310.06201).

    Args:
        logits: ``[B, n, V]``; those at t predict the token at t + 1.
        ids: ``[B, n]`` int64.
        rows: of the n tokens, so many.
    """
    likely = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # Nothing predicts the first token: it counts as the least expected.
    likely = torch.cat([likely.new_full((len(ids), 1), -torch.inf), likely], 1)
    return likely.topk(rows, largest=False).indices.sort(-1).values
