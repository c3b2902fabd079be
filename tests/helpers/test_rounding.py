"""How far apart two computations of the same numbers may be, and that what is wrong is further."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.testing.rounding import InFloat64, allowed, check_close, check_ranking, error, nudged
from tests.memory.tiny import build

pytestmark = pytest.mark.two_computations


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_another_order(a, b):
    """The product of two matrices, added up backwards and one by one."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for place in reversed(range(a.shape[1])):
        total = total + a[:, place : place + 1] * b[place]
    return total


@given(st.integers(1, 300), st.integers(0, 2**16))
def test_sums_in_another_order_pass(terms, seed):
    a, b = drawn(3, terms, seed=seed), drawn(terms, 2, seed=seed + 1)
    exact = a.double() @ b.double()
    moved = [nudged(a, torch.float32, seed) @ nudged(b, torch.float32, seed + 1) for seed in (0, 2, 4)]
    assert error(in_another_order(a, b), exact) <= allowed(a @ b, exact, *moved)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: (a.bfloat16() @ b.bfloat16()).float(),
        lambda a, b: a[:, :-1] @ b[:-1],
        lambda a, b: (a @ b).roll(1, 0),
        lambda a, b: (a @ b) * (1 + 1e-4),
        lambda a, b: (a @ b).masked_fill(torch.eye(40, dtype=torch.bool), math.nan),
    ],
    ids=["half precision", "a term left out", "another row", "scaled", "NaN"],
)
def test_what_is_wrong_does_not(wrong):
    a, b = drawn(40, 200), drawn(200, 40, seed=1)
    with pytest.raises(AssertionError, match=r"product: error .*, allowed "):
        check_close(wrong(a, b), a @ b, a.double() @ b.double(), name="product")


def test_another_shape_is_no_error_of_rounding():
    with pytest.raises(ValueError, match=r"cannot compare shapes \[2\] and \[1, 2\]"):
        error(torch.zeros(2), torch.zeros(1, 2))


def test_infinite_numbers_must_be_infinite_in_both():
    inf = torch.tensor([math.inf, 1.0])
    assert error(inf, inf.double()) == 0
    assert error(torch.tensor([-math.inf, 1.0]), inf.double()) == math.inf


class TestRanking:
    SCORES: ClassVar[dict] = {7: 0.5, 3: 0.5 + 1e-7, 9: 0.4, 1: -1.0}

    @pytest.mark.parametrize("ids", [[], [3], [7], [3, 7], [7, 3], [7, 3, 9, 1]])
    def test_rows_within_rounding_may_be_exchanged(self, ids):
        check_ranking(ids, self.SCORES, 1e-7)

    @pytest.mark.parametrize("ids", [[9], [3, 9], [3, 7, 1], [3, 9, 7], [7, 3, 1, 9]])
    def test_others_may_not(self, ids):
        with pytest.raises(AssertionError, match=r"row [91] is ranked \d"):
            check_ranking(ids, self.SCORES, 1e-7)

    def test_no_row_comes_twice(self):
        with pytest.raises(AssertionError, match="twice"):
            check_ranking([3, 3], self.SCORES, 1e-7)


def test_a_decoder_stays_in_float64():
    """Norms and softmax of transformers take what they are given to float32, and would round as float32 does."""
    model = build()
    wide, ids = copy.deepcopy(model).double(), torch.arange(3, 12)[None]
    with torch.no_grad():
        plain, half_way = model(input_ids=ids).logits, wide(input_ids=ids).logits
        with InFloat64():
            exact = wide(input_ids=ids).logits
        again = wide(input_ids=ids).logits
    assert exact.dtype == torch.float64
    assert torch.equal(again, half_way), "the mode ends with its context"
    rounding = error(plain, exact)
    assert 0 < rounding < 1e-5
    assert 1e-9 < error(half_way, exact) < rounding
