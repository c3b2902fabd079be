"""The guards see what they are there to see."""

from __future__ import annotations

import pytest
import torch

from tests.interpreted.checks import check_close, error
from tests.interpreted.guards import MARGIN, Output, guarded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_guarded_tensor_holds_the_same_among_what_nobody_can_use(dtype):
    tensor = torch.ones(2, 3, dtype=dtype)
    inside = guarded(tensor)
    assert torch.equal(inside, tensor)
    assert inside.stride(-1) == 1
    around = torch.as_strided(inside, (2, 5), inside.stride(), inside.storage_offset() - 1)[:, [0, 4]]
    if dtype.is_floating_point:
        assert around.isnan().all()
    else:
        assert bool((around == (True if dtype == torch.bool else torch.iinfo(dtype).max // 2)).all())


def test_an_output_must_be_written_and_nothing_else():
    output = Output(2, 3)
    with pytest.raises(AssertionError, match="not written"):
        output.check()
    output.inside.fill_(1.0)
    output.check()
    assert bool((output.inside == 1).all()), "looking changes nothing"


@pytest.mark.parametrize("offset", [-MARGIN, -1, 3, MARGIN])
def test_what_is_written_outside_is_seen(offset):
    output = Output(2, 3)
    output.inside.fill_(1.0)
    place = output.inside.storage_offset() + offset
    torch.as_strided(output.inside, (1,), (1,), place).fill_(0.0)
    with pytest.raises(AssertionError, match="written outside"):
        output.check()


def test_errors_are_infinite_where_there_is_nan():
    assert error(torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf])) == 0.5
    assert error(torch.tensor([torch.nan]), torch.tensor([1.0])) == torch.inf
    assert error(torch.tensor([1.0]), torch.tensor([torch.inf])) == torch.inf
    exact = torch.tensor([1.0])
    check_close(exact + 2e-7, exact, exact, torch.float32)
    with pytest.raises(AssertionError, match="allowed"):
        check_close(exact + 2e-6, exact, exact, torch.float32)
