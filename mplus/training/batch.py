"""Batch: what streams write and read in one training step, where batches come from, and how they are put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from attrs import define
from torch import Tensor

Saved: TypeAlias = "bool | int | float | str | Tensor | list[Saved] | tuple[Saved, ...] | dict[str, Saved] | None"
"""Plain data and tensors, as a checkpoint keeps them."""
IGNORE_INDEX = -100
"""Label of a token that is not predicted, as in transformers."""

NO_SOURCE = -1
"""Source of a text that nothing was written about."""


@define(frozen=True, eq=False, kw_only=True)
class Batch:
    """B streams write C chunks each, then read R texts each.

    Attributes:
        chunks: ``[B, C, n]`` int64, written in this order; C may be 0.
        sources: ``[B, C]`` int64, what each chunk tells of. A number means the same thing in every stream, and a
            stream does not write it again before it starts anew, unless the chunks belong together.
        texts: ``[B, R, T]`` int64, read after the chunks were written, independently of each other.
        labels: ``[B, R, T]`` int64: the token itself where it is predicted from those before it, else ``IGNORE_INDEX``.
        mask: ``[B, R, T]`` bool, False at padding, which is on the right.
        text_sources: ``[B, R]`` int64: the source a text continues or asks for; ``NO_SOURCE`` where none was written.
        query_mask: ``[B, R, T]`` bool: the tokens that retrieval may see, so that it does not look at what is to be
            predicted; None: all that ``mask`` leaves.
        answer_mask: ``[B, R, T]`` bool: the labels that accuracy is about; None: all of them.
        reset: every stream forgets all before this batch.
        windows: ``[B, S]`` int64: the newest chunks and a text as one plain text, for objectives without memory; or
            None where the source has none. The label of padding is ``IGNORE_INDEX``.
        window_labels: ``[B, S]`` int64, as ``labels``.
        window_mask: ``[B, S]`` bool, False at padding.
    """

    chunks: Tensor
    sources: Tensor
    texts: Tensor
    labels: Tensor
    mask: Tensor
    text_sources: Tensor
    query_mask: Tensor | None = None
    answer_mask: Tensor | None = None
    reset: bool = False
    windows: Tensor | None = None
    window_labels: Tensor | None = None
    window_mask: Tensor | None = None


class BatchSource(ABC):
    """Makes batches for B streams. Built as ``Source(options, tokenizer=, numbers=, seed=)``.

    Example:
        >>> import torch
        >>> from mplus.training.batch import NO_SOURCE, BatchSource, TextSample, collate
        >>> class Counting(BatchSource):
        ...     def __init__(self, options, *, tokenizer, numbers, seed):
        ...         self.numbers, self.step = list(numbers), 0
        ...     def next_batch(self, chunks=1, *, repeat=False):
        ...         self.step += 1
        ...         rows = [[torch.arange(4) + number for _ in range(chunks)] for number in self.numbers]
        ...         texts = [[TextSample(torch.arange(6) + number, source=NO_SOURCE)] for number in self.numbers]
        ...         return collate(rows, [[self.step] * chunks for _ in rows], texts, chunk_tokens=4)
        ...     def state_dict(self):
        ...         return {"step": self.step}
        ...     def load_state_dict(self, state):
        ...         self.step = state["step"]
        >>> Counting(None, tokenizer=None, numbers=range(2), seed=0).next_batch(3).chunks.shape
        torch.Size([2, 3, 4])

    What stream i gets depends on the seed and on its global number only, not on which process holds it or on the
    other streams, and a source that was restored goes on as the one that was saved would have.
    """

    @abstractmethod
    def next_batch(self, chunks: int = 1, *, repeat: bool = False) -> Batch:
        """Make the next batch.

        Args:
            chunks: C, chunks written by each stream, as far as the data has so many.
            repeat: ask for the chunks themselves rather than for what follows them (repeat task).

        Raises:
            InputError: the source cannot do that (no repeat task, or no text long enough); it names the rule.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Saved]:
        """Return position and random state as plain data and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Saved]) -> None:
        """Go on from a saved position."""


@define(frozen=True, eq=False)
class TextSample:
    """One text of one stream.

    Attributes:
        ids: ``[t]``.
        source: what it continues or asks for.
        prompt_tokens: its first tokens, which are not to be predicted; at least 1.
        query_tokens: its first tokens, which retrieval sees; None: all.
        answer: ``(start, end)`` of the tokens that accuracy is about; None: all that are predicted.
    """

    ids: Tensor
    source: int
    prompt_tokens: int = 1
    query_tokens: int | None = None
    answer: tuple[int, int] | None = None

    def labels(self) -> Tensor:
        """Return ``[t]`` int64: the ids that are to be predicted, and ``IGNORE_INDEX`` for the prompt."""
        labels = self.ids.clone()
        labels[: self.prompt_tokens] = IGNORE_INDEX
        return labels


@define(frozen=True, eq=False)
class Windows:
    """Plain texts of ``tokens`` tokens, one per stream.

    Attributes:
        tokens: S.
        past: per stream, what comes before the text.
        whole: predict all of it; False: only what is predicted of the text.
        texts: the texts; None: the first of each stream.
    """

    tokens: int
    past: Sequence[Tensor]
    whole: bool
    texts: Sequence[TextSample] | None = None


def collate(
    chunks: Sequence[Sequence[Tensor]],
    sources: Sequence[Sequence[int]],
    texts: Sequence[Sequence[TextSample]],
    chunk_tokens: int,
    windows: Windows | None = None,
    *,
    reset: bool = False,
) -> Batch:
    """Return a batch of B streams with C chunks of ``chunk_tokens`` and R texts each."""
    streams = len(chunks)
    flat = [text for row in texts for text in row]
    shape = (streams, len(texts[0]), -1)
    lengths = torch.tensor([len(text.ids) for text in flat])
    places = torch.arange(int(lengths.max())).expand(len(flat), -1)
    seen = [len(text.ids) if text.query_tokens is None else text.query_tokens for text in flat]
    answer_mask = None
    if any(text.answer is not None for text in flat):
        spans = torch.tensor([text.answer or (text.prompt_tokens, len(text.ids)) for text in flat])
        answer_mask = ((places >= spans[:, :1]) & (places < spans[:, 1:])).view(shape)
    written = (
        torch.stack([chunk for row in chunks for chunk in row]) if chunks[0] else torch.empty(0, dtype=torch.int64)
    )
    shown = {} if windows is None else _windows(windows, [row[0] for row in texts])
    return Batch(
        chunks=written.view(streams, len(chunks[0]), chunk_tokens),
        sources=torch.tensor(sources, dtype=torch.int64).view(streams, len(chunks[0])),
        texts=_padded([text.ids for text in flat], 0).view(shape),
        labels=_padded([text.labels() for text in flat], IGNORE_INDEX).view(shape),
        mask=(places < lengths[:, None]).view(shape),
        text_sources=torch.tensor([[text.source for text in row] for row in texts]),
        query_mask=(places < torch.tensor(seen)[:, None]).view(shape),
        answer_mask=answer_mask,
        reset=reset,
        **shown,
    )


def _windows(windows: Windows, first: Sequence[TextSample]) -> dict[str, Tensor]:
    """Return ``windows``, ``window_labels`` and ``window_mask`` ``[B, S]``, padded on the left."""
    ids = torch.zeros(len(windows.past), windows.tokens, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids, dtype=torch.bool)
    for row, (past, text) in enumerate(zip(windows.past, windows.texts or first, strict=True)):
        whole = torch.cat([past, text.ids])[-windows.tokens :]
        start = windows.tokens - len(whole)
        # The first token has nothing in front of it that would predict it, so it never has a label.
        ids[row, start:], mask[row, start:] = whole, True
        if windows.whole:
            labels[row, start + 1 :] = whole[1:]
        else:
            wanted = torch.cat([torch.full_like(past, IGNORE_INDEX), text.labels()])[-windows.tokens :]
            labels[row, start + 1 :] = wanted[1:]
    return {"windows": ids, "window_labels": labels, "window_mask": mask}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
