"""Masks that are padding and causality, told from others."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.reference import ReferenceBackend
from mplus.backends.triton.backend import without_mask

pytestmark = pytest.mark.two_computations


def request(batch: int, length: int, text: int, seed: int = 0) -> AttentionRequest:
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    memory = Segment(normal(batch, 2, 3, 4), normal(batch, 2, 3, 4))
    queries, keys, values = normal(batch, 4, length, 4), normal(batch, 2, text, 4), normal(batch, 2, text, 4)
    return AttentionRequest(queries=queries, keys=keys, values=values, scale=0.5, segments=(memory,))


def padded_mask(padding: list[int], length: int, text: int) -> torch.Tensor:
    """``[B, 1, T, S]``, one entry at a time."""
    mask = torch.zeros(len(padding), 1, length, text, dtype=torch.bool)
    for row, hidden in enumerate(padding):
        for query in range(length):
            for key in range(text):
                mask[row, 0, query, key] = hidden <= key <= text - length + query
    return mask


@given(
    length=st.integers(1, 5),
    past=st.integers(0, 4),
    padding=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    additive=st.booleans(),
    blind=st.booleans(),
)
def test_padding_is_read_off_a_mask(length: int, past: int, padding: list[int], additive: bool, blind: bool) -> None:
    text = length + past
    padding = [min(hidden, text - 1) for hidden in padding]
    mask = padded_mask(padding, length, text)
    if blind:  # what queries at padding see is left open
        mask |= ~mask.any(-1, keepdim=True)
    given_mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    asked = evolve(request(len(padding), length, text), mask=given_mask if additive else mask)
    found = without_mask(asked)
    assert found is not None
    assert found.mask is None
    assert ([0] * len(padding) if found.padding is None else found.padding.tolist()) == padding
    expected, output = (ReferenceBackend().attend(one).output for one in (asked, found))
    real = torch.arange(text - length, text) >= torch.tensor(padding)[:, None]
    torch.testing.assert_close(output.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@given(place=st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 5)))
def test_a_mask_with_another_entry_is_not_taken_for_padding(place: tuple[int, int, int]) -> None:
    """Unless it is that of the padding next to text, which hides one key more or less from all."""
    row, query, key = place
    mask = padded_mask([0, 2], 4, 6)
    mask[row, 0, query, key] ^= True
    found = without_mask(evolve(request(2, 4, 6), mask=mask))
    if found is None:
        return
    padding = torch.zeros(2, dtype=torch.int64) if found.padding is None else found.padding
    for one in range(2):
        for own in range(4):
            if 2 + own >= padding[one]:
                seen = [int(padding[one]) <= k <= 2 + own for k in range(6)]
                assert mask[one, 0, own].tolist() == seen


@pytest.mark.parametrize("change", ["bias", "heads", "both"])
def test_what_is_no_padding_is_left_to_others(change: str) -> None:
    asked = request(1, 3, 3)
    mask = padded_mask([1], 3, 3)
    if change == "bias":
        biased = torch.zeros(1, 1, 3, 3, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        biased[..., 2, 2] = 0.5
        assert without_mask(evolve(asked, mask=biased)) is None
    elif change == "heads":
        mask = mask.repeat(1, 4, 1, 1)
        mask[:, 1, 2, 1] = False
        assert without_mask(evolve(asked, mask=mask)) is None
    else:
        assert without_mask(evolve(asked, mask=mask, padding=torch.tensor([1]))) is None
    assert without_mask(asked) is asked
