"""From each stream's pieces to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.training.batch import IGNORE_INDEX, Batch


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
        ids[row, start:], mask[row, start:] = whole, True
        if windows.whole:
            labels[row, start + 1 :] = whole[1:]
        else:
            wanted = torch.cat([torch.full_like(past, IGNORE_INDEX), text.labels()])[-windows.tokens :]
            labels[row, start + 1 :] = wanted[1:]
    return {"windows": ids, "window_labels": labels, "window_mask": mask}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
