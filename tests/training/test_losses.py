"""Losses against the sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from mplus.training.objectives.losses import accuracy, balanced_bce, contrastive, token_loss

pytestmark = pytest.mark.two_computations

GENERATOR = torch.Generator().manual_seed(0)


def test_token_loss_predicts_the_next_token_where_there_is_a_label():
    logits = torch.randn(2, 3, 4, 7, generator=GENERATOR)
    labels = torch.full((2, 3, 4), -100)
    labels[0, 1, 2], labels[1, 2, 3], labels[0, 0, 0] = 5, 1, 3  # nothing predicts the first token of a text
    expected = -(logits[0, 1, 1].log_softmax(-1)[5] + logits[1, 2, 2].log_softmax(-1)[1]) / 2
    torch.testing.assert_close(token_loss(logits, labels), expected)
    assert token_loss(logits, torch.full_like(labels, -100)) == 0


def test_accuracy_wants_every_answer_token_of_a_text():
    labels = torch.tensor([[[9, 1, 2], [9, 1, 2], [9, 1, -100], [-100, -100, -100]]])
    said = torch.tensor([[[1, 2, 0], [1, 3, 0], [2, 2, 0], [0, 0, 0]]])
    logits = torch.nn.functional.one_hot(said, 10).float()
    assert accuracy(logits, labels) == pytest.approx(1 / 3)
    answer_mask = torch.tensor([False, False, True]).expand_as(labels)
    assert accuracy(logits, labels, answer_mask) == pytest.approx(1 / 2)
    assert math.isnan(accuracy(logits, torch.full_like(labels, -100)))


def test_contrastive_is_what_each_row_lacks_among_the_negative_ones():
    scores = torch.randn(2, 3, 5, generator=GENERATOR, requires_grad=True)
    positive = torch.zeros(2, 3, 5, dtype=torch.bool)
    positive[0, 0, :2] = positive[1, 2, 4] = True
    usable = torch.ones_like(positive)
    usable[0, 0, 4] = False
    e = scores.exp()
    first = [-(e[0, 0, row] / (e[0, 0, row] + e[0, 0, 2:4].sum())).log() for row in (0, 1)]
    second = -(e[1, 2, 4] / e[1, 2].sum()).log()
    torch.testing.assert_close(contrastive(scores, positive, usable), (sum(first) / 2 + second) / 2)
    assert contrastive(scores, torch.zeros_like(positive), usable) == 0
    contrastive(scores, positive, usable).backward()
    assert bool(scores.grad.isfinite().all())


def test_contrastive_wants_every_row_found():
    positive = torch.tensor([[[True, True, False]]])
    usable = torch.ones_like(positive)
    one, both = torch.tensor([[[9.0, -9.0, 0.0]]]), torch.tensor([[[9.0, 9.0, 0.0]]])
    assert contrastive(one, positive, usable) > 4
    assert contrastive(both, positive, usable) < 1e-3


def test_contrastive_without_a_negative_row_asks_for_nothing():
    scores = torch.randn(1, 1, 2, generator=GENERATOR, requires_grad=True)
    positive = torch.tensor([[[True, False]]])
    loss = contrastive(scores, positive, positive.clone())
    loss.backward()
    assert loss == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_bce_weighs_both_classes_alike():
    scores = torch.rand(1, 2, 4, generator=GENERATOR)
    positive = torch.tensor([[[True, True, False, False], [False] * 4]])
    usable = torch.tensor([[[True, True, True, False], [True] * 4]])
    p = scores[0, 0] + 0
    expected = (-(p[:2] + 1e-5).log().mean() - (1 - p[2] + 1e-5).log()) / 2
    torch.testing.assert_close(balanced_bce(scores, positive, usable), expected)
    assert balanced_bce(scores, torch.zeros_like(positive), usable) == 0
