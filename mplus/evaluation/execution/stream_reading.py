"""Reading streams: questions to many of them at one moment, and what brings their long-term rows back."""

from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from mplus.evaluation.execution.base import ID_BYTES, Moment
from mplus.mechanisms.short_term.batched_prefix import RowSelector
from mplus.mechanisms.short_term.batched_streams import BatchedStreams
from mplus.mechanisms.short_term.long_term_rows import LongTermRows
from mplus.retrievers.base import Retriever
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.ram import RamStore


@define(frozen=True, eq=False)
class RandomSelector:
    """Any rows, whatever the text says; the floor."""

    generator: torch.Generator = field(factory=lambda: torch.Generator().manual_seed(0))

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """Select rows, see ``mplus.mechanisms.short_term.batched_prefix.RowSelector``."""
        drawn = torch.rand(*text.shape[:2], ltm.count, generator=self.generator).to(text.device)
        best = drawn.topk(count, dim=2)
        return best.indices, best.values


@define(frozen=True, eq=False)
class RecencySelector:
    """The rows written last."""

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """Select rows, see ``mplus.mechanisms.short_term.batched_prefix.RowSelector``."""
        best = ltm.birth.topk(count, dim=1)
        each = text.shape[1]
        return best.indices[:, None].expand(-1, each, -1), best.values.to(text.dtype)[:, None].expand(-1, each, -1)


@define(frozen=True, eq=False)
class OracleSelector:
    """The rows that were written from what a text is about, then any others; the ceiling. It needs the labels.

    Attributes:
        about: ``[B, R]`` int64, the source each text is about.
    """

    about: Tensor
    generator: torch.Generator = field(factory=lambda: torch.Generator().manual_seed(0))

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """Select rows, see ``mplus.mechanisms.short_term.batched_prefix.RowSelector``."""
        # As in mplus.evaluation.oracle: useful rows first, others at random.
        asked = (ltm.source[:, None] == self.about[:, :, None]).to(text.dtype)
        drawn = torch.rand(asked.shape, generator=self.generator).to(text.device)
        best = (asked + drawn / 2).topk(count, dim=2)
        return best.indices, best.values


@define(eq=False)
class SelectSelector:
    """The rows a retriever selects from stores that follow the streams of one telling: as in a read of memories.

    Keys are made by the retriever when a row comes, so its weights must stay what they are.

    Attributes:
        retriever: selects.
        stores: one per stream, of the births, sources and keys of its long-term rows.
    """

    retriever: Retriever
    stores: list[MemoryStore] = field(factory=list)

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """Select rows, see ``mplus.mechanisms.short_term.batched_prefix.RowSelector``."""
        places, scores = [], []
        for stream, store in enumerate(self.follow(layer, rows, ltm)):
            projected = self.retriever.project_queries(layer, text[stream])
            found = self.retriever.select(layer, projected, queries[stream], [store] * text.shape[1], count)
            order = ltm.birth[stream].argsort()
            for selection in found:
                # A selection names rows of the store; their births say where they lie in the stream.
                births = store.gather(layer, selection.ids).birth
                places.append(order[torch.searchsorted(ltm.birth[stream][order], births)])
                scores.append(selection.scores)
        shape = (*text.shape[:2], count)
        return torch.stack(places).view(shape), torch.stack(scores).view(shape)

    def follow(self, layer: int, rows: Tensor, ltm: LongTermRows) -> list[MemoryStore]:
        """Bring one layer of the stores up to the long-term rows of the streams, ``[B, m, d]`` after the input norm."""
        layout = StoreLayout(
            layers=self.retriever.shape.layers,
            hidden_size=rows.shape[2],
            keeps_hidden=False,
            key_size=self.retriever.key_size,
            dtype=rows.dtype,
            device=rows.device,
        )
        self.stores += [RamStore(layout) for _ in range(rows.shape[0] - len(self.stores))]
        for stream, store in enumerate(self.stores):
            births, column = ltm.birth[stream], store.column(layer, "birth")
            held = births[:0] if column is None else column
            store.remove(layer, store.ids(layer)[~torch.isin(held, births)])
            new = (~torch.isin(births, held)).nonzero().squeeze(1)
            new = new[births[new].argsort()]  # stores number rows as they come, and searches go by order of birth
            keys = self.retriever.project_keys(layer, rows[stream, new])
            store.append(layer, MemoryRows(None, births[new], ltm.source[stream, new], key=keys))
        return self.stores


@define(eq=False)
class StreamMoment(Moment):
    """Questions to B streams, A to each.

    Attributes:
        memory: the streams.
        texts: ``[B, A, T]`` int64: the question and its right answer, padded on the right.
        queries: ``[B, A, T]`` bool, the question's tokens.
        answers: ``[B, A, T]`` bool, the answer's tokens.
        about: ``[B, A]`` int64, the number of the passage with the answer; ``NO_SOURCE`` where it was never told.
    """

    memory: BatchedStreams
    texts: Tensor
    queries: Tensor
    answers: Tensor
    about: Tensor

    def right(self, logits: Tensor) -> Tensor:
        """Return ``[B, A]`` bool: which questions were answered right."""
        return right_answers(logits, self.texts, self.answers)


@define(eq=False)
class StreamWay:
    """A way of reading streams.

    Attributes:
        selector: brings long-term rows back; None: none are read.
        oracle: bring back those that the answer was written to.
    """

    selector: RowSelector | None = None
    oracle: bool = False

    def chosen(self, moment: StreamMoment) -> RowSelector | None:
        """Return the selector of rows for these questions."""
        return OracleSelector(moment.about) if self.oracle else self.selector


def stream_bytes(streams: BatchedStreams, long_term: bool) -> int:
    """Return the bytes of one stream's short-term rows, source and birth included, and of its long-term rows if asked.

    Long-term rows have retriever keys, too.
    """
    layout = streams.layout
    row = layout.hidden_size * layout.dtype.itemsize + 2 * ID_BYTES
    held = layout.layers * streams.rows * row
    keyed = row + layout.key_size * layout.dtype.itemsize
    return held + (sum(rows.count * keyed for rows in streams.ltm) if long_term else 0)


def right_answers(logits: Tensor, texts: Tensor, answers: Tensor) -> Tensor:
    """Return ``[...]`` bool: every token of the answer is the most probable one, as greedy decoding has it.

    Args:
        logits: ``[..., T, V]``.
        texts: ``[..., T]`` int64, question and answer.
        answers: ``[..., T]`` bool, the answer's tokens.
    """
    said = logits[..., :-1, :].argmax(-1)
    return ((said == texts[..., 1:]) | ~answers[..., 1:]).all(-1)
