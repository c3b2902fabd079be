"""Words of token ids: runs of pieces of letters and digits, case and white space folded away."""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from mplus.tokenizer import PieceTokenizer

SPACES = ("Ġ", "▁")
"""What stands for a leading space in the pieces of byte-level and of SentencePiece vocabularies."""
BASE = 0x9E3779B97F4A7C15
"""Of the polynomial that numbers words, modulo 2**64."""


@define(frozen=True, eq=False)
class Folding:
    """The case-folded letters of every piece of a vocabulary, and behind them an id that is none: V in all.

    Attributes:
        numbers: ``[V]`` int64, a hash of the piece's letters and digits, case folded.
        powers: ``[V]`` int64, by which the number of what stands in front of it in a word is multiplied.
        opens: ``[V]`` bool, the piece begins a new word, by a space or a sign in front.
        inside: ``[V]`` bool, there is a letter or digit in it.

    Example:
        >>> folding = Folding.of(tokenizer)
        >>> ids = torch.tensor(tokenizer("Keller, keller").input_ids)
        >>> words, counts = folding.words(ids, torch.tensor([len(ids)]))
        >>> bool(words[0] == words[1]), counts.tolist()
        (True, [2])
    """

    numbers: Tensor
    powers: Tensor
    opens: Tensor
    inside: Tensor

    @classmethod
    def of(cls, tokenizer: PieceTokenizer) -> Folding:
        """Make the tables of a tokenizer of transformers."""
        pieces = [*map(str, tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))), ""]
        special = set(tokenizer.all_special_ids)
        folded = (piece.lstrip("".join(SPACES)).casefold() for piece in pieces)
        letters = [
            "" if place in special else "".join(sign for sign in piece if sign.isalnum())
            for place, piece in enumerate(folded)
        ]
        # A script without case has no spaces between words, as a rule: its pieces count one by one.
        caseless = [piece[:1].isalpha() and piece[:1].lower() == piece[:1].upper() for piece in pieces]
        opens = [
            alone or not piece[:1].isalnum() or piece.startswith(SPACES)
            for piece, alone in zip(pieces, caseless, strict=True)
        ]
        return cls(
            numbers=torch.tensor([_number(text) for text in letters], dtype=torch.int64),
            powers=torch.tensor([_signed(pow(BASE, len(text), 2**64)) for text in letters], dtype=torch.int64),
            opens=torch.tensor(opens),
            inside=torch.tensor([bool(text) for text in letters]),
        )

    def words(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the words of texts as numbers, ``[m]`` int64, and how many each text has, ``[c]`` int64.

        A word that is cut in different ways into pieces has one number, wherever it stands.

        Args:
            ids: ``[n]`` int, the tokens of all texts, one behind the other.
            lengths: ``[c]`` int64, tokens of each text.
        """
        # Ids that the tokenizer has no piece for stand for the last piece, which is empty.
        at = ids.long().clamp(max=len(self.inside) - 1)
        inside = self.inside[at]
        # One more than there are tokens: the last text ends there.
        first = torch.zeros(len(at) + 1, dtype=torch.bool)
        first[0] = True
        first[lengths.cumsum(0)] = True
        opens = inside & (self.opens[at] | first[:-1])
        # A word begins behind a piece without a letter, too.
        opens[1:] |= inside[1:] & ~inside[:-1]
        starts = opens.nonzero().squeeze(1)
        numbers, powers = self.numbers[at], self.powers[at]
        words, place = numbers[starts], starts + 1
        growing = torch.arange(len(starts))
        while len(growing):  # one round for each further piece of the longest word
            within = place < len(at)
            growing, place = growing[within], place[within]
            more = inside[place] & ~opens[place]
            growing, place = growing[more], place[more]
            # The number of a word is a polynomial in BASE, of its letters: it is the same however the word is cut.
            words[growing] = words[growing] * powers[place] + numbers[place]
            place = place + 1
        text_of = torch.searchsorted(lengths.cumsum(0), starts, right=True)
        return words, torch.bincount(text_of, minlength=len(lengths))


def _number(text: str) -> int:
    number = 0
    for sign in text:
        number = (number * BASE + ord(sign)) % 2**64
    return _signed(number)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
