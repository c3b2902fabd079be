"""From each stream's pieces to the tensors of a turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.training.batch import IGNORED, Turn


@define(frozen=True, eq=False)
class Text:
    """One text of one stream.

    Attributes:
        ids: ``[t]``.
        about: source it is about.
        given: its first tokens, which are not to be predicted; at least 1.
        seen: its first tokens, which retrieval sees; None: all.
        answer: ``(start, end)`` of the tokens that accuracy is about; None: all that are predicted.
    """

    ids: Tensor
    about: int
    given: int = 1
    seen: int | None = None
    answer: tuple[int, int] | None = None

    def labels(self) -> Tensor:
        """``[t]``."""
        labels = self.ids.clone()
        labels[: self.given] = IGNORED
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
    texts: Sequence[Text] | None = None


def make_turn(
    chunks: Sequence[Sequence[Tensor]],
    sources: Sequence[Sequence[int]],
    texts: Sequence[Sequence[Text]],
    chunk_tokens: int,
    windows: Windows | None = None,
    *,
    fresh: bool = False,
) -> Turn:
    """A turn of B streams with C chunks of ``chunk_tokens`` and R texts each."""
    streams = len(chunks)
    flat = [text for row in texts for text in row]
    shape = (streams, len(texts[0]), -1)
    lengths = torch.tensor([len(text.ids) for text in flat])
    places = torch.arange(int(lengths.max())).expand(len(flat), -1)
    seen = [len(text.ids) if text.seen is None else text.seen for text in flat]
    answers = None
    if any(text.answer is not None for text in flat):
        spans = torch.tensor([text.answer or (text.given, len(text.ids)) for text in flat])
        answers = ((places >= spans[:, :1]) & (places < spans[:, 1:])).view(shape)
    written = (
        torch.stack([chunk for row in chunks for chunk in row]) if chunks[0] else torch.empty(0, dtype=torch.int64)
    )
    shown = {} if windows is None else _windows(windows, [row[0] for row in texts])
    return Turn(
        chunks=written.view(streams, len(chunks[0]), chunk_tokens),
        sources=torch.tensor(sources, dtype=torch.int64).view(streams, len(chunks[0])),
        texts=_padded([text.ids for text in flat], 0).view(shape),
        labels=_padded([text.labels() for text in flat], IGNORED).view(shape),
        mask=(places < lengths[:, None]).view(shape),
        about=torch.tensor([[text.about for text in row] for row in texts]),
        queries=(places < torch.tensor(seen)[:, None]).view(shape),
        answers=answers,
        fresh=fresh,
        **shown,
    )


def _windows(windows: Windows, first: Sequence[Text]) -> dict[str, Tensor]:
    """``windows``, ``window_labels`` and ``window_mask`` ``[B, S]``, padded on the left."""
    ids = torch.zeros(len(windows.past), windows.tokens, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids, dtype=torch.bool)
    for row, (past, text) in enumerate(zip(windows.past, windows.texts or first, strict=True)):
        whole = torch.cat([past, text.ids])[-windows.tokens :]
        start = windows.tokens - len(whole)
        ids[row, start:], mask[row, start:] = whole, True
        if windows.whole:
            labels[row, start + 1 :] = whole[1:]
        else:
            wanted = torch.cat([torch.full_like(past, IGNORED), text.labels()])[-windows.tokens :]
            labels[row, start + 1 :] = wanted[1:]
    return {"windows": ids, "window_labels": labels, "window_mask": mask}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
