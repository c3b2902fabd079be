"""Vectors of short texts, such as names and passages, for memories of text that compare by cosine."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mplus.config import must_be
from mplus.mechanisms.text.asking import Ask
from mplus.retrievers.chunks.dense import Encoder, encoder_class

WIDTH = 1024
"""Numbers of a vector of n-grams."""
GRAM = 3
"""Characters of an n-gram."""
MOST_TABLES = 4
"""Collections of texts whose vectors are kept from one read to the next."""
HIDDEN = re.compile(r"hidden:(0|[1-9]\d*)")

vectors_name = must_be(
    'where vectors come from: "ngrams", "hidden:LAYER" (as in "hidden:0"), or "encoder:NAME" of sentence-transformers',
    lambda value: (
        isinstance(value, str)
        and (value == "ngrams" or HIDDEN.fullmatch(value) is not None or value[:8] == "encoder:" != value)
    ),
)
"""Validator of an option that names where vectors come from."""


class TextVectors:
    """Makes vectors of texts, of length 1, and keeps those of the texts that were compared last.

    - "ngrams": hashed n-grams of 3 characters, 1,024 numbers; nothing is trained, and no pass of the decoder is run.
    - "hidden:LAYER": the mean over a text's tokens of what the decoder's layer gives; "hidden:0": its embeddings.
    - "encoder:NAME": an encoder of sentence-transformers, by name or folder (``pip install 'mplus[dense]'``).

    Example:
        >>> vectors = TextVectors("ngrams")
        >>> one, other, third = vectors.of(["Apple Inc.", "Apple Inc", "Lisbon"], ask=None)
        >>> bool(one @ other > one @ third)
        True
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._tables: tuple[dict[str, Tensor], ...] = ()
        self._encoder: Encoder | None = None

    def of(self, texts: Sequence[str], ask: Ask | None) -> Tensor:
        """Return ``[n, w]`` float32, the vector of each text; of one that is empty, zeros, which are near to nothing.

        Args:
            texts: any; equal ones are computed once.
            ask: the decoder; needed for "hidden:LAYER" only.
        """
        known = {text: vector for table in reversed(self._tables) for text, vector in table.items()}
        said = [text for text in dict.fromkeys(texts) if text.strip()]
        new = [text for text in said if text not in known]
        if new:
            known |= dict(zip(new, self._made(new, ask), strict=True))
        table = {text: known[text] for text in said}
        # Exchanged as a whole: other threads go on with what they have.
        others = [other for other in self._tables if not other.keys() <= table.keys()]
        self._tables = (table, *others)[:MOST_TABLES]
        nothing = torch.zeros_like(next(iter(table.values()), torch.zeros(1)))
        return torch.stack([table.get(text, nothing) for text in texts]) if texts else torch.zeros(0, 1)

    def _made(self, texts: Sequence[str], ask: Ask | None) -> Tensor:
        hidden = HIDDEN.fullmatch(self.source)
        if hidden is not None and ask is not None:
            found = ask.vectors(texts, int(hidden[1]))
        elif self.source == "ngrams":
            found = torch.stack([_ngrams(text) for text in texts])
        else:
            found = self._encoded(texts)
        return normalize(found.float(), dim=-1)

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        if self._encoder is None:
            self._encoder = encoder_class(f"vectors = {self.source!r}")(self.source.removeprefix("encoder:"))
        return self._encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False).cpu()

    def __getstate__(self) -> dict[str, str]:
        return {"source": self.source}  # the encoder is loaded again

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["source"])  # type: ignore[misc]


def _ngrams(text: str) -> Tensor:
    # With a blank at either end, which tells where the first word begins and the last one ends.
    padded = f" {' '.join(text.casefold().split())} "
    grams = [padded[at : at + GRAM] for at in range(max(len(padded) - GRAM + 1, 1))]
    # Not hash(), which differs from process to process.
    places = torch.tensor([zlib.crc32(gram.encode("utf-8", "surrogatepass")) % WIDTH for gram in grams])
    return torch.bincount(places, minlength=WIDTH).float()
