"""The gather kernel, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from mplus.backends.triton.configs import WIDEST
from mplus.backends.triton.gather import gather_rotated, plain_gather_rotated
from mplus.backends.triton.kernels import gather as kernels
from mplus.errors import InputError, NotSupported
from mplus.testing.strategies import CONFORMANCE
from tests.interpreted.checks import GATHER_CASES, SMALL, GatherShape, check_gather

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def buffers(shape, slots=None, dtype=torch.float32):
    count = shape.count if slots is None else slots
    return (
        torch.zeros(shape.heads, count, shape.width, dtype=dtype),
        torch.zeros(shape.heads, count, shape.value_width, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATHER_CASES)
def test_cases(name, dtype):
    check_gather(kernels, GATHER_CASES[name], dtype)


@st.composite
def shapes(draw):
    width = draw(st.integers(1, 40))
    return GatherShape(
        stored=draw(st.integers(1, 50)),
        count=draw(st.integers(1, 40)),
        heads=draw(st.integers(1, 3)),
        width=width,
        value_width=draw(st.integers(1, 40)),
        rotated=2 * draw(st.integers(0, width // 2)),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(CONFORMANCE, max_examples=12)
@given(shape=shapes(), dtype=st.sampled_from(DTYPES))
def test_every_shape(shape, dtype):
    check_gather(kernels, shape, dtype)


def test_slots_of_a_prefix():
    """Only the slots given are written."""
    shape = GatherShape()
    rows, indices, cos, sin = shape.build()
    keys, values = buffers(shape, slots=50)
    gather_rotated(rows, indices, cos, sin, keys[:, 7:28], values[:, 7:28], interpret=True)
    expected = buffers(shape)
    plain_gather_rotated(rows, indices, cos, sin, *expected)
    for whole, part in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(whole[:, 7:28], part)
        assert not whole[:, :7].any()
        assert not whole[:, 28:].any()


def test_nothing_to_gather():
    shape = GatherShape(count=0)
    gather_rotated(*shape.build(), *buffers(shape), interpret=True)


def test_a_row_that_is_not_there_is_zeros():
    """Where indices are not looked at before the kernel, it reads nothing from elsewhere."""
    shape = GatherShape()
    rows, indices, cos, sin = shape.build()
    indices[3], indices[5] = -1, shape.stored
    keys, values = buffers(shape)
    kernels.launch(rows, indices, cos, sin, keys, values, SMALL)
    for part in (keys, values):
        assert not part[:, [3, 5]].any()
        assert part[:, [2, 4, 6]].all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.ones(40, 7)}, "rows must be"),
        ({"indices": torch.zeros(21, dtype=torch.int32)}, "int64"),
        ({"indices": torch.full((21,), 40)}, "from 0 to 39, got 40 to 40"),
        ({"indices": torch.full((21,), -1)}, "from 0 to 39, got -1 to -1"),
        ({"cos": torch.ones(21, 13), "sin": torch.ones(21, 13)}, "an even number"),
        ({"cos": torch.ones(21, 22), "sin": torch.ones(21, 22)}, "up to 20"),
        ({"cos": torch.ones(21, 10)}, "cos and sin"),
        ({"keys": torch.zeros(3, 21, 20, dtype=torch.float16)}, "keys must be torch.float32"),
        ({"values": torch.zeros(2, 21, 18)}, "keys and values"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    shape = GatherShape()
    rows, indices, cos, sin = shape.build()
    keys, values = buffers(shape)
    arguments = {"rows": rows, "indices": indices, "cos": cos, "sin": sin, "keys": keys, "values": values, **change}
    with pytest.raises(InputError, match=words):
        gather_rotated(**arguments, interpret=True)


def test_what_the_kernel_cannot_take_is_refused_with_reasons():
    shape = GatherShape(width=WIDEST + 1, value_width=2)
    with pytest.raises(NotSupported, match=f"width {WIDEST + 1}"):
        gather_rotated(*shape.build(), *buffers(shape), interpret=True)
    shape = GatherShape()
    with pytest.raises(NotSupported, match="device cpu"):
        gather_rotated(*shape.build(), *buffers(shape))
    keys, values = buffers(shape)
    with pytest.raises(NotSupported, match="adjacent"):
        gather_rotated(*shape.build(), keys.mT.contiguous().mT, values, interpret=True)
