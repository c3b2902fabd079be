"""Late interaction (ColBERT, Khattab and Zaharia 2020): how well the tokens of a chunk match those of a question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import normalize

from mplus.mechanisms.kv.passes import BegunDecoder, padded
from mplus.retrievers.chunks.statements import statements
from mplus.tokenizer import Tokenizer

LAYERS = 4
"""Layers whose values are compared."""
BATCH = 16
"""Statements in one pass."""
SMALLEST = 1e-6
"""Spread that every token has at least, so that texts which differ in none are matched by all of them alike."""


@define(frozen=True, eq=False)
class LateInteraction:
    """Compares the values that a few layers keep of tokens: each token of a question with the closest one of a chunk.

    The values of a chunk are in the memory anyway, so that nothing more is kept of it. A score of 0 is what a passage
    has for a question that it does not answer, on the average; the unit is the standard deviation of such scores.

    Attributes:
        layers: ``[k]`` int64, among those that carry memory.
        unrelated: ``[2]``, mean and standard deviation of the match of a question and a passage that does not answer
            it.
    """

    layers: Tensor
    unrelated: Tensor

    @staticmethod
    def calibrate(decoder: BegunDecoder, tokenizer: Tokenizer) -> Tensor:
        """Choose the layers in which the questions of ``statements()`` match their own passages best; see ``flat``."""
        texts = statements()
        passages, told = _values_of([one.passage for one in texts], decoder, tokenizer)
        questions, asked = _values_of([one.question for one in texts], decoder, tokenizer)

        def compared(layers: Tensor) -> Tensor:
            return mean_matches(questions[layers], asked, passages[layers], told).cpu().double()

        margins = [_margin(compared(torch.tensor([layer]))) for layer in range(len(passages))]
        layers = torch.stack(margins).topk(min(LAYERS, len(margins))).indices.sort().values
        return LateInteraction(layers, torch.stack(_unrelated(compared(layers)))).flat()

    def flat(self) -> Tensor:
        """Return all of it as one vector ``[k + 2]`` float32."""
        return torch.cat([self.layers.float(), self.unrelated.float()])

    @staticmethod
    def from_flat(flat: Tensor) -> LateInteraction:
        """Return what ``flat`` made a vector of."""
        return LateInteraction(flat[:-2].long(), flat[-2:])

    def scores(self, matches: Tensor) -> Tensor:
        """Return the score of each of ``matches``, those of ``mean_matches``, as float64."""
        return (matches.cpu().double() - self.unrelated[0]) / self.unrelated[1]


def mean_matches(questions: Tensor, asked: Tensor, texts: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over a question's tokens of the highest cosine with a token of each text (MaxSim), ``[a, c]``.

    The cosine of two tokens is the mean over all heads of all layers.

    Args:
        questions: ``[k, q, Hkv, Dv]``, values of the tokens of all questions in k layers, one behind the other.
        asked: ``[a]`` int64, tokens of each question.
        texts: ``[k, n, Hkv, Dv]``, of all texts.
        lengths: ``[c]`` int64, tokens of each text.
    """
    flat_questions, flat_texts = (_flat(values) for values in (questions, texts))
    return _means_of_best(flat_questions @ flat_texts.T, asked, lengths)


def matches_among(questions: Sequence[Tensor], texts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return matches of questions and a few texts, ``[a, c]``, and ``mean_matches`` of the texts, ``[c, c]``.

    A token of a question counts by the square of how far the texts differ in their best match with it: all notes about
    a person match the name alike, which so hides no longer what is asked of them.

    Args:
        questions: of each ``[k, q_i, Hkv, Dv]``.
        texts, lengths: as of ``mean_matches``.
    """
    flat = _flat(texts)
    rows = torch.cat([*(_flat(question) for question in questions), flat])
    asked = torch.cat([torch.tensor([question.shape[1] for question in questions]), lengths])
    best = _best(rows @ flat.T, lengths).split(asked.tolist())
    found = torch.stack([_weighed(own) for own in best[: len(questions)]])
    return found, torch.stack([own.mean(0) for own in best[len(questions) :]])


def _flat(values: Tensor) -> Tensor:
    """Return ``[n, k Hkv Dv]`` float32 of values ``[k, n, Hkv, Dv]``, so that products are the means of all cosines."""
    heads = values.shape[0] * values.shape[2]
    flat: Tensor = (normalize(values.float(), dim=-1) / heads**0.5).transpose(0, 1).flatten(1)
    return flat


def _means_of_best(cosines: Tensor, asked: Tensor, lengths: Tensor) -> Tensor:
    """Return ``[a, c]``: the means over the rows of each question of the highest of ``cosines`` ``[q, n]`` per text."""
    return torch.stack([tokens.mean(0) for tokens in _best(cosines, lengths).split(asked.tolist())])


def _best(cosines: Tensor, lengths: Tensor) -> Tensor:
    """Return ``[q, c]``, the highest of ``cosines`` ``[q, n]`` with the tokens of each text."""
    text_of = torch.arange(len(lengths)).repeat_interleave(lengths).to(cosines.device).expand_as(cosines)
    return cosines.new_full((len(cosines), len(lengths)), -1).scatter_reduce(1, text_of, cosines, "amax")


def _weighed(best: Tensor) -> Tensor:
    """Return ``[c]``, the mean of the matches ``[q, c]`` of tokens, each by how far texts differ in it."""
    spread = (best.amax(1) - best.amin(1)).clamp(min=SMALLEST).square()
    return (best * spread[:, None]).sum(0) / spread.sum()


def _values_of(texts: Sequence[str], decoder: BegunDecoder, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return ``[L, n, Hkv, Dv]`` of all tokens of texts, and the tokens of each; long texts are read together."""
    ids = [torch.as_tensor(one) for one in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        read, mask = padded([ids[place] for place in some])
        values = torch.stack(list(decoder.values(read, mask)))
        found |= {place: values[:, row, : len(ids[place])] for row, place in enumerate(some)}
    return torch.cat([found[place] for place in range(len(ids))], 1), torch.tensor([len(one) for one in ids])


def _margin(similar: Tensor) -> Tensor:
    """Return how far questions match their own passages above others, in standard deviations."""
    mean, deviation = _unrelated(similar)
    return (similar.diag().mean() - mean) / deviation


def _unrelated(similar: Tensor) -> tuple[Tensor, Tensor]:
    wrong = similar[~torch.eye(len(similar), dtype=torch.bool)]
    return wrong.mean(), wrong.std()
