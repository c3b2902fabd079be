"""TextEncoder: what makes the key of a group of its text, and that of a question; two of them.

The paper's encoder is BGE-M3, a frozen model of its own. ``SentenceEncoder`` is any that sentence-transformers loads;
``HiddenStates`` asks the decoder itself, so that no other model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from mplus.errors import InputError, MissingDependencyError
from mplus.mechanisms.decoder import Decoder

SPREAD = 1e-4
"""Least standard deviation of a dimension of keys, beside which theirs are small by chance."""


class TextEncoder(Protocol):
    """Makes vectors of texts, of which those of texts about the same thing have a large inner product."""

    def groups(self, ids: Sequence[Tensor], hidden: Tensor, tokenizer: Any) -> Tensor:
        """Return the keys ``[g, v]`` float32 on the CPU of the groups of one chunk.

        Args:
            ids: of each group ``[n_i]`` int64.
            hidden: ``[n, d]``, what one layer of the decoder received for all of their tokens.
            tokenizer: of the memory, or None.
        """

    def queries(self, ids: Sequence[Tensor], decoder: Decoder, tokenizer: Any) -> Tensor:
        """Return the vectors ``[q, v]`` float32 on the CPU of texts to ask with, ids ``[n_i]`` int64 each."""

    def compared(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return queries ``[q, v]`` whose inner products with ``keys`` ``[c, v]`` are the scores."""


class HiddenStates:
    """The mean of what one of the lower layers receives for the tokens of a text, of length 1.

    Hidden states of all texts point into nearly the same direction, and differ in a few of it: queries are compared
    with keys about the mean of the keys that there are, each dimension divided by their spread.

    Args:
        layer: whose inputs are averaged; 0: those are the embeddings of tokens.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def groups(self, ids: Sequence[Tensor], hidden: Tensor, tokenizer: Any) -> Tensor:
        parts = hidden.detach().float().split([len(one) for one in ids])
        return normalize(torch.stack([part.mean(0) for part in parts]), dim=-1).cpu()

    def queries(self, ids: Sequence[Tensor], decoder: Decoder, tokenizer: Any) -> Tensor:
        lengths = torch.tensor([len(one) for one in ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded, device = pad_sequence([one.cpu() for one in ids], batch_first=True), decoder.shape.device
        with torch.no_grad():
            found = decoder.run(padded.to(device), mask=mask.to(device), adapter="write", collect={"inputs"})
        hidden = found.inputs[self.layer].float().cpu().masked_fill(~mask[..., None], 0)
        return normalize(hidden.sum(1) / lengths[:, None], dim=-1)

    def compared(self, queries: Tensor, keys: Tensor) -> Tensor:
        spread = keys.std(0, correction=0).clamp(min=SPREAD)
        return (queries - keys.mean(0)) / spread**2


class SentenceEncoder:
    """An encoder of sentence-transformers (``pip install 'mplus-memlong[dense]'``), loaded when it is first needed.

    It needs a tokenizer of the memory, which makes text of ids. Its vectors are brought to length 1, so that inner
    products are cosines.

    Args:
        name: of the encoder, or its folder; "BAAI/bge-m3" is the paper's.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[type[SentenceEncoder], tuple[str]]:
        return SentenceEncoder, (self.name,)  # a copy loads it again

    @cached_property
    def model(self) -> Any:
        """The encoder. Raises MissingDependencyError where sentence-transformers is not installed."""
        try:
            import sentence_transformers
        except ImportError as error:
            raise MissingDependencyError(
                f"encoder {self.name!r} of the mechanism 'memlong' needs the package 'sentence_transformers', which is "
                "not installed: pip install 'mplus-memlong[dense]', or leave encoder out to ask the decoder itself",
                name="sentence_transformers",
            ) from error
        return sentence_transformers.SentenceTransformer(self.name)

    def groups(self, ids: Sequence[Tensor], hidden: Tensor, tokenizer: Any) -> Tensor:
        return self._encoded(ids, tokenizer)

    def queries(self, ids: Sequence[Tensor], decoder: Decoder, tokenizer: Any) -> Tensor:
        return self._encoded(ids, tokenizer)

    def compared(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries

    def _encoded(self, ids: Sequence[Tensor], tokenizer: Any) -> Tensor:
        if tokenizer is None:
            raise InputError(
                f"encoder {self.name!r} reads text, so the memory needs a tokenizer: pass tokenizer= to new_memory, "
                "load or open, or leave encoder out to ask the decoder itself"
            )
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        found: Tensor = self.model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        return normalize(found.float().cpu(), dim=-1)
