"""Losses: of predicted tokens, and of the retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from mplus.config import flag, number, one_of, whole
from mplus.errors import ConfigError
from mplus.retrievers.base import Retriever
from mplus.training.batch import IGNORE_INDEX, NO_SOURCE
from mplus.training.parallel import global_mean

if TYPE_CHECKING:
    from mplus.mechanisms.streams import Candidates, LayerRead, Read

EPSILON = 1e-5
"""Added to probabilities before their logarithm (published constant)."""

NEVER = -1e30
"""Score of a row that takes no part; finite, so that a text without any negative row has a gradient, of 0."""


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of the tokens to be predicted; 0 where there are none.

    Among several processes the mean of their losses is the mean over all their tokens (``global_mean``); so it is for
    the retriever's losses.

    Args:
        logits: ``[..., T, V]``; those at t predict the token at t + 1.
        labels: ``[..., T]`` int64, the token at t, or ``IGNORE_INDEX``.
    """
    wanted = labels[..., 1:].flatten()
    predicted = logits[..., :-1, :].flatten(0, -2).float()
    total = cross_entropy(predicted, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
    return global_mean(total, (wanted != IGNORE_INDEX).sum())


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor, answer_mask: Tensor | None = None) -> float:
    """Return the share of texts whose every token to be predicted is the most probable one.

    Args:
        logits: ``[..., T, V]``.
        labels: ``[..., T]``, as for ``token_loss``.
        answer_mask: ``[..., T]`` bool, the labels that count; None: all of them. Texts without any are left out.
    """
    counted = labels != IGNORE_INDEX
    if answer_mask is not None:
        counted = counted & answer_mask
    counted = counted[..., 1:]
    # A token that does not count is as good as right, so that a text is judged by those that do.
    right = (logits[..., :-1, :].argmax(-1) == labels[..., 1:]) | ~counted
    asked = counted.any(-1)
    return float(right.all(-1)[asked].float().mean()) if bool(asked.any()) else float("nan")


@define(frozen=True, kw_only=True)
class RetrieverLoss:
    """Trains the retriever to find the rows that a text needs: those written from its source.

    Attributes:
        kind: "contrastive": mean of ``-log`` of each such row's share in the softmax over it and the others; "bce":
            mean of ``-log p`` over those rows plus mean of ``-log (1 - p)`` over the others, p the score (M+ section
            3.2.2; needs a score between 0 and 1, as "sigmoid_mean").
        weight: factor on the loss.
        detach: keep its gradient out of the decoder (M+ stage 3).
        negatives: "stream": a text's own stream gives the rows it is to be told from; "batch": all streams do, except
            rows written from the same source. With "batch" the loss depends on how many streams a process holds.
        candidates: rows of each stream that are scored: all that its texts need, then others at random.
        encoder_weight: factor on a second loss, of the same kind, in which the newest chunk's rows ask which of
            the candidates were written from its source (released code; the retriever needs ``encoder_queries``). For
            data in which several chunks have one source.
    """

    kind: Literal["contrastive", "bce"] = field(default="contrastive", validator=one_of("contrastive", "bce"))
    weight: float = field(default=0.3, validator=number(0))
    detach: bool = field(default=True, validator=flag)
    negatives: Literal["stream", "batch"] = field(default="stream", validator=one_of("stream", "batch"))
    candidates: int = field(default=96, validator=whole(1))
    encoder_weight: float = field(default=0.0, validator=number(0))

    def wanted(self, text_sources: Tensor, generators: Sequence[torch.Generator]) -> Candidates:
        """Return the ``candidates`` argument of ``TrainingStreams.read``.

        Args:
            text_sources: ``[B, R]`` int64, of the texts that are read.
            generators: one per stream, so that a stream's candidates do not depend on the other streams.
        """

        def choose(layer: int, sources: Tensor) -> Tensor:
            asked = (sources[:, None] == text_sources[:, :, None]).any(1)
            drawn = torch.stack([torch.rand(sources.shape[1], generator=generator) for generator in generators])
            rank = drawn.to(sources.device) + asked  # draws lie below 1: what was asked for comes before all others
            return rank.topk(min(self.candidates, sources.shape[1]), dim=1).indices

        return choose

    def __call__(self, retriever: Retriever, read: Read, query_mask: Tensor, text_sources: Tensor) -> Tensor:
        """Return the weighted loss, its mean over layers.

        Args:
            retriever: with a differentiable ``score``.
            read: made with ``wanted``.
            query_mask: ``[B, R, T]`` bool, the tokens that retrieve.
            text_sources: ``[B, R]`` int64; texts about ``NO_SOURCE``, or about what is no longer held, do not count.
        """
        terms = []
        for layer, seen in read.layers.items():
            term = self.weight * self._read_term(retriever, layer, seen, query_mask, text_sources)
            if self.encoder_weight:
                term = term + self.encoder_weight * self._write_term(retriever, layer, seen)
            terms.append(term)
        return torch.stack(terms).mean()

    def _read_term(
        self, retriever: Retriever, layer: int, seen: LayerRead, query_mask: Tensor, text_sources: Tensor
    ) -> Tensor:
        text = seen.text.detach() if self.detach else seen.text
        batch, each, tokens, size = text.shape
        projected = retriever.project_queries(layer, text.reshape(batch * each, tokens, size))
        return self._term(retriever, layer, seen, projected.view(batch, each, tokens, -1), query_mask, text_sources)

    def _write_term(self, retriever: Retriever, layer: int, seen: LayerRead) -> Tensor:
        newest, source = _there(seen.recent), _there(seen.recent_source)
        projected = retriever.project_encoder_queries(layer, newest.detach() if self.detach else newest)[:, None]
        everything = torch.ones(projected.shape[:3], dtype=torch.bool, device=projected.device)
        return self._term(retriever, layer, seen, projected, everything, source[:, -1:])

    def _term(
        self, retriever: Retriever, layer: int, seen: LayerRead, projected: Tensor, mask: Tensor, text_sources: Tensor
    ) -> Tensor:
        """Return the loss of queries ``[B, R, T, r]`` for rows written from ``text_sources`` ``[B, R]``."""
        rows, source = _there(seen.candidates), _there(seen.candidate_source)
        batch, each, tokens = projected.shape[:3]
        keys = _there(retriever.project_keys(layer, (rows.detach() if self.detach else rows).flatten(0, 1)))
        positive = (source[:, None] == text_sources[:, :, None]) & (text_sources != NO_SOURCE)[:, :, None]
        if self.negatives == "stream":
            scores = retriever.score(layer, projected, mask, keys.view(batch, -1, keys.shape[-1]))
            usable = torch.ones_like(positive)
        else:
            # As one text with many queries, so that each is scored against the rows of all streams.
            flat = (1, batch * each)
            scores = retriever.score(layer, projected.view(*flat, tokens, -1), mask.reshape(*flat, tokens), keys[None])
            scores = scores.view(batch, each, -1)
            own = torch.eye(batch, dtype=torch.bool, device=text_sources.device).repeat_interleave(rows.shape[1], 1)[
                :, None
            ]
            same = source.flatten() == text_sources[:, :, None]
            # Rows that another stream wrote from the same source are neither right nor wrong.
            usable = own | ~same
            positive = own & same & (text_sources != NO_SOURCE)[:, :, None]
        return (
            contrastive(scores, positive, usable)
            if self.kind == "contrastive"
            else balanced_bce(scores, positive, usable)
        )


def _there(tensor: Tensor | None) -> Tensor:
    """Return a tensor of a read that a retriever loss needs. Raises ConfigError where the read made none."""
    if tensor is None:
        raise ConfigError("a retriever loss needs a read made with its own candidates, and a retriever with keys")
    return tensor


def contrastive(scores: Tensor, positive: Tensor, usable: Tensor) -> Tensor:
    """Return ``-log`` of the softmax share of a positive row among itself and all negative ones.

    Mean over a text's positive rows, then over the texts that have any; 0 where none has. Every positive row counts by
    itself: were their shares added up, one row found would be enough, and the others would be left to chance.

    Args:
        scores: ``[B, R, m]``.
        positive, usable: ``[B, R, m]`` bool; only usable rows take part.
    """
    counted = positive.any(-1)
    some, wanted = scores.float()[counted], positive[counted]
    against = usable[counted] & ~wanted
    others = some.masked_fill(~against, NEVER).logsumexp(-1, keepdim=True)
    # softplus(b - a) is -log(exp(a) / (exp(a) + exp(b))): the row's share among itself and all negative ones.
    each = softplus(others - some).masked_fill(~wanted, 0).sum(-1) / wanted.sum(-1)
    return global_mean(each.sum(), counted.sum())


def balanced_bce(scores: Tensor, positive: Tensor, usable: Tensor) -> Tensor:
    """Return half the mean of ``-log p`` of positive rows plus half that of ``-log (1 - p)`` of others, a scalar.

    Texts without a positive row do not count; an empty class contributes 0. Arguments as for ``contrastive``.
    """
    counted = positive.any(-1, keepdim=True)
    positive, negative = positive & counted, usable & ~positive & counted
    p = scores.float()
    up = global_mean(-((p + EPSILON).log() * positive).sum(), positive.sum())
    down = global_mean(-((1 - p + EPSILON).log() * negative).sum(), negative.sum())
    return (up + down) / 2
