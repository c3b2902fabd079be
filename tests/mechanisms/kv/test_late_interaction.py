"""How well tokens match, against cosines written out: within what rounding can do in any order of summation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mplus.mechanisms.kv.late_interaction import matches_among, mean_matches
from mplus.testing.rounding import after


def written_out(question: Tensor, texts: list[Tensor]) -> Tensor:
    """Return the best cosines ``[c, q]`` of a question ``[k, q, H, D]`` with texts ``[k, n, H, D]``, in float64."""
    found = []
    for text in texts:
        cosines = cosine_similarity(question.double()[:, :, None], text.double()[:, None], dim=-1, eps=0)
        found.append(cosines.mean((0, 3)).amax(1))
    return torch.stack(found)


def weighed(best: Tensor, error: float) -> tuple[Tensor, float]:
    """Return the means ``[c]`` of ``best`` ``[c, q]`` by squared spread, and how far ``best + error`` puts them off."""
    spread = best.amax(0) - best.amin(0)
    # A spread is off by twice the error, its square by the derivative; a mean moves by that share of what it averages.
    moved = 2 * float((4 * spread * error + 4 * error**2).sum() / spread.square().sum())
    return (best * spread.square()).sum(1) / spread.square().sum(), error + moved


@pytest.mark.parametrize(("layers", "heads", "width"), [(1, 1, 4), (4, 3, 64)])
def test_matches_are_means_of_the_best_cosines_in_every_order_of_summation(layers: int, heads: int, width: int):
    torch.manual_seed(width)
    questions = [torch.randn(layers, tokens, heads, width) for tokens in (1, 7)]
    texts = [100 * torch.randn(layers, tokens, heads, width) for tokens in (5, 1, 9)]
    joined, lengths = torch.cat(texts, 1), torch.tensor([5, 1, 9])
    alone = mean_matches(torch.cat(questions, 1), torch.tensor([1, 7]), joined, lengths)
    among, alike = matches_among(questions, joined, lengths)
    best = [written_out(question, texts) for question in questions]
    # A norm takes width / 2 roundings and one for its root, dividing by it one and by the root of the heads two; that
    # twice, for both vectors, then the sum over all heads. A mean over 9 tokens takes 9. Sizes add up to 1 at most.
    bound = after(width + 8 + layers * heads * width + 9)
    assert float((alone.double() - torch.stack([one.mean(1) for one in best])).abs().max()) <= bound
    for found, one in zip(among, best, strict=True):
        exact, moved = weighed(one, bound)
        assert float((found.double() - exact).abs().max()) <= moved < 0.05
    itself = torch.stack([written_out(text, texts).mean(1) for text in texts])
    assert float((alike.double() - itself).abs().max()) <= bound
    assert float(alike.diag().min()) >= 1 - bound, "every token is its own best match"
    assert bound < 0.001, "far below what tells one text from another"
