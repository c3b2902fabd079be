"""The scoring kernel, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from mplus.backends.triton.configs import WIDEST, Tiles
from mplus.backends.triton.kernels import score as kernels
from mplus.backends.triton.score import plain_sigmoid_means, sigmoid_means
from mplus.errors import InputError, NotSupported
from mplus.retrievers.scores import sigmoid_mean
from mplus.testing.strategies import CONFORMANCE
from tests.interpreted.checks import SCORE_CASES, SMALL, ScoreShape, check_score

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCORE_CASES)
def test_cases(name, dtype):
    check_score(kernels, SCORE_CASES[name], dtype)


@settings(CONFORMANCE, max_examples=12)
@given(
    shape=st.builds(
        ScoreShape,
        batch=st.integers(1, 3),
        length=st.integers(1, 40),
        count=st.integers(1, 70),
        width=st.integers(1, 40),
        masked=st.booleans(),
        shared=st.booleans(),
        seed=st.integers(0, 2**16),
    ),
    dtype=st.sampled_from(DTYPES),
    tiles=st.sampled_from([SMALL, Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1)]),
)
def test_every_shape(shape, dtype, tiles):
    check_score(kernels, shape, dtype, tiles)


def test_the_specification_is_the_score_of_the_retriever():
    queries, mask, keys = ScoreShape(shared=False).build()
    assert torch.equal(plain_sigmoid_means(queries, mask, keys), sigmoid_mean(queries, mask, keys))


@pytest.mark.parametrize("empty", ["keys", "tokens", "texts"])
def test_nothing_to_score(empty):
    queries = torch.ones(0 if empty == "texts" else 2, 0 if empty == "tokens" else 3, 4)
    keys = torch.ones(0 if empty == "keys" else 5, 4)
    scores = sigmoid_means(queries, None, keys, interpret=True)
    assert scores.shape == (queries.shape[0], keys.shape[0])
    assert not scores.any()


def test_keys_in_another_dtype_than_queries():
    queries, mask, keys = ScoreShape().build()
    keys = keys[0].bfloat16()
    found = sigmoid_means(queries, mask, keys, interpret=True)
    torch.testing.assert_close(found, plain_sigmoid_means(queries, mask, keys), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("queries", "mask", "keys", "words"),
    [
        ((3, 4), None, (5, 4), "queries must be"),
        ((2, 3, 4), None, (5, 3), "queries must be"),
        ((2, 3, 4), None, (3, 5, 4), "queries must be"),
        ((2, 3, 4), torch.ones(2, 4, dtype=torch.bool), (5, 4), r"mask must be \[2, 3\] bool"),
        ((2, 3, 4), torch.ones(2, 3), (5, 4), "mask must be"),
    ],
)
def test_what_does_not_fit_is_refused(queries, mask, keys, words):
    with pytest.raises(InputError, match=words):
        sigmoid_means(torch.ones(queries), mask, torch.ones(keys), interpret=True)


def test_what_the_kernel_cannot_take_is_refused_with_reasons():
    wide = torch.ones(1, 2, WIDEST + 1, dtype=torch.float64)
    with pytest.raises(NotSupported, match=rf"float64.*width {WIDEST + 1}"):
        sigmoid_means(wide, None, wide[0], interpret=True)
    with pytest.raises(NotSupported, match="device cpu"):
        sigmoid_means(torch.ones(1, 2, 3), None, torch.ones(2, 3))
