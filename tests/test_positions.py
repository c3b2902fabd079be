"""Where memory rows sit, and that the decoder sees them there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.hf.positions import MemoryPositions
from tests import oracle
from tests.architectures import BY_NAME
from tests.comparisons import TOLERANCE, error
from tests.retrofitted import retrofit

CPU = torch.device("cpu")


@given(rows=st.integers(1, 60), span=st.integers(1, 80))
def test_compressed_rows_keep_their_order_within_the_span(rows: int, span: int) -> None:
    (place,) = MemoryPositions("compressed", span).of_memory(rows, None, 0, CPU).tolist()
    assert place == sorted(place)
    assert -min(rows, span) == place[0]
    assert place[-1] <= -1
    assert len(set(place)) == min(rows, span)


@given(real=st.integers(1, 30), filler=st.integers(1, 30), span=st.integers(1, 40))
def test_filler_takes_no_positions(real: int, filler: int, span: int) -> None:
    positions = MemoryPositions("compressed", span)
    valid = torch.arange(real + filler)[None] >= filler
    (padded,) = positions.of_memory(real + filler, valid, 0, CPU)
    (alone,) = positions.of_memory(real, None, 0, CPU)
    assert padded[filler:].tolist() == alone.tolist()


def test_sequential_constant_and_offset() -> None:
    assert MemoryPositions().of_memory(3, None, 0, CPU).tolist() == [[-3, -2, -1]]
    assert MemoryPositions(offset=True).of_memory(3, None, 5, CPU).tolist() == [[2, 3, 4]]
    assert MemoryPositions("constant").of_memory(3, None, 0, CPU).tolist() == [[-1, -1, -1]]
    assert [MemoryPositions(kind, 4).extent(9) for kind in ("sequential", "constant", "compressed")] == [9, 1, 4]


@pytest.mark.parametrize(
    ("kind", "span", "place"),
    [
        ("compressed", 4, [-4, -4, -4, -3, -3, -2, -2, -1, -1]),
        ("constant", None, [-1] * 9),
        ("compressed", 30, list(range(-9, 0))),
    ],
)
@torch.no_grad()
def test_the_decoder_sees_memory_where_the_config_puts_it(kind: str, span: int | None, place: list[int]) -> None:
    pair = retrofit(BY_NAME["llama"], "eager", memory_positions=kind, position_span=span)
    memory = pair.memory(chunks=2)
    (view,) = memory.snapshot()
    rows = [torch.cat([begin, stm.hidden]) for begin, stm in zip(pair.begin, view.state.stm, strict=True)]
    assert len(rows[0]) == len(place)
    ids = pair.text(9)
    found = pair.wrapped(input_ids=ids, memory=memory).logits
    assert error(found, oracle.read(pair.plain, ids, rows, torch.tensor(place))) <= TOLERANCE
    if place != list(range(-9, 0)):
        assert error(found, oracle.read(pair.plain, ids, rows)) > 0.1, "another place must be another answer"
