"""The merge and the window of LaMemo."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from mplus_lamemo import refresh
from mplus_lamemo.attention import attended, lookahead_keys, looks_ahead, merged, weights

from mplus.errors import InputError


def test_a_merge_is_attention_to_both() -> None:
    scores, values = torch.randn(2, 3, 4, 7, dtype=torch.float64), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    whole = attended(scores, values)
    for split in (1, 3, 6):
        one = attended(scores[..., :split], values[:, :, :split])
        two = attended(scores[..., split:], values[:, :, split:])
        found, alpha = merged(one, two)
        assert torch.allclose(found.vectors, whole.vectors)
        assert torch.allclose(found.mass, whole.mass)
        assert torch.allclose(alpha, (one.mass - whole.mass).exp())


def test_a_place_that_sees_nothing_keeps_what_it_has() -> None:
    scores = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    seen = torch.tensor([[True, True, False], [False, False, False]])
    old, new = attended(torch.zeros(1, 1, 2, 1).double(), torch.ones(1, 1, 1, 2).double()), torch.randn(1, 1, 3, 2)
    found, alpha = merged(old, attended(scores, new.double(), seen))
    assert alpha[0, 0, 1].item() == 1.0
    assert torch.equal(found.vectors[0, 0, 1], old.vectors[0, 0, 1])
    found.vectors.sum().backward()
    assert bool(scores.grad.isfinite().all())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "lengths", [[5] * 6, [5, 5, 5, 1, 1, 1, 1], [5, 5, 5, 5, 3, 5], [1, 7, 2, 12, 3], [20, 1, 20, 4], [1] * 9]
)
@pytest.mark.parametrize("memory", [1, 5, 12])
def test_every_pair_is_seen_once_whatever_the_lengths(lengths: list[int], memory: int) -> None:
    """While a place is in the window, it sees every key behind it that the window or the first token brings, once."""
    seen, begin, ahead = Counter[tuple[int, int]](), 0, 0
    expected = set[tuple[int, int]]()
    for q in lengths:
        m = min(begin, memory)
        first, behind = lookahead_keys(m, m + q, ahead)
        for i, row in enumerate(looks_ahead(m, first, behind).tolist()):
            seen.update((begin - m + i, begin - m + first + j) for j, sees in enumerate(row) if sees)
        expected |= {(i, j) for i in range(begin - m, begin) for j in range(i + 1, begin + 1)}
        begin, ahead = begin + q, q
    assert set(seen.values()) <= {1}
    assert set(seen) == expected


def test_the_present_length_skips_and_doubles_pairs() -> None:
    """The defect of the released code that ``window="present"`` keeps."""
    seen, begin = Counter[tuple[int, int]](), 0
    for q in (5, 5, 5, 5, 3, 5):
        m = min(begin, 12)
        first, behind = lookahead_keys(m, m + q, q)
        for i, row in enumerate(looks_ahead(m, first, behind).tolist()):
            seen.update((begin - m + i, begin - m + first + j) for j, sees in enumerate(row) if sees)
        begin += q
    assert max(seen.values()) == 2


def test_numbers_that_make_no_window_are_refused() -> None:
    for given in ((5, 4, 1), (-1, 4, 1), (2, 4, -1)):
        with pytest.raises(InputError, match="look-ahead"):
            lookahead_keys(*given)


def test_masks_are_followed() -> None:
    added = torch.tensor([[0.0, torch.finfo(torch.float32).min]])
    assert refresh._sees(added).tolist() == [[True, False]]
    assert math.isinf(float(weights(torch.zeros(1, 1, 1, 2), torch.zeros(1, 2, dtype=torch.bool))[1]))
