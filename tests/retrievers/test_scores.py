"""Products of queries and keys in every order of summation, within what rounding can do: a bound, not a measurement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mplus.retrievers.scores import WIDE, score_into, score_rows
from mplus.testing.rounding import after


def transposed(keys: Tensor) -> Tensor:
    return keys.T.contiguous().T


@pytest.mark.parametrize("lie", [torch.clone, transposed])
@pytest.mark.parametrize(
    ("width", "tokens", "texts"), [(8, 1, 1), (WIDE - 1, 16, 1), (WIDE, 16, 1), (256, 5, 1), (256, 9, 3)]
)
def test_a_product_is_off_by_what_its_roundings_can_do_at_most(lie, width: int, tokens: int, texts: int):
    generator = torch.Generator().manual_seed(width)
    queries = 30 * torch.randn(texts, tokens, width, generator=generator)
    keys = torch.randn(999, width, generator=generator) * 10 ** torch.randn(999, 1, generator=generator)
    mean = queries.double().mean(1)
    exact, sizes = mean @ keys.double().T, queries.double().abs().mean(1) @ keys.double().abs().T
    found = score_rows("mean_dot", list(queries), lie(keys))
    alone = torch.empty(999)
    score_into(alone, "mean_dot", queries[0], [lie(keys[:400]), lie(keys[400:])])
    # Each term: as many roundings for the mean as there are tokens, one for the product, and those of a sum.
    bound = after(tokens + width) * sizes
    assert bool(((found.double() - exact).abs() <= bound).all())
    assert bool(((alone.double() - exact[0]).abs() <= bound[0]).all())
    halves = mean.bfloat16().double() @ keys.double().T
    assert not bool(((halves - exact).abs() <= bound).all()), "the bound tells half precision"
