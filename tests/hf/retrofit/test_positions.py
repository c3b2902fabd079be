"""Where memory rows sit, and that the decoder sees them there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.architectures import oracle as attention_oracle
from benchmarks.quality.architectures.comparisons import error
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import retrofit
from mplus.hf.retrofit.positions import MemoryPositions
from tests.helpers import noise

pytestmark = pytest.mark.two_computations


def placed(positions: MemoryPositions, rows: int, offset: int = 0) -> list[int]:
    (place,) = positions.of_rows(torch.arange(rows), rows, offset).tolist()
    return place


@given(rows=st.integers(1, 60), span=st.integers(1, 80))
def test_compressed_rows_keep_their_order_within_the_span(rows: int, span: int) -> None:
    place = placed(MemoryPositions("compressed", span), rows)
    assert place == sorted(place)
    assert -min(rows, span) == place[0]
    assert place[-1] <= -1
    assert len(set(place)) == min(rows, span)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    span=st.integers(1, 40),
    layout=st.sampled_from(["sequential", "compressed", "constant"]),
)
def test_every_stream_is_placed_as_if_alone(lengths: list[int], span: int, layout: str) -> None:
    positions = MemoryPositions(layout, span)
    found = positions.of_rows(torch.arange(30), torch.tensor(lengths)[:, None])
    for rows, together in zip(lengths, found.expand(len(lengths), -1), strict=True):
        assert together[:rows].tolist() == placed(positions, rows)


@given(start=st.integers(0, 10), rows=st.integers(1, 20), behind=st.integers(0, 10), span=st.integers(1, 40))
def test_a_part_is_placed_as_in_the_whole(start: int, rows: int, behind: int, span: int) -> None:
    total = start + rows + behind
    for positions in (MemoryPositions(), MemoryPositions("compressed", span), MemoryPositions("constant")):
        (part,) = positions.of_rows(torch.arange(start, start + rows), total).tolist()
        assert part == placed(positions, total)[start : start + rows]


def test_sequential_constant_and_offset() -> None:
    assert placed(MemoryPositions(), 3) == [-3, -2, -1]
    assert placed(MemoryPositions(offset=True), 3, 5) == [2, 3, 4]
    assert placed(MemoryPositions("constant"), 3) == [-1, -1, -1]
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
    assert error(found, attention_oracle.read(pair.plain, ids, rows, torch.tensor(place))) <= noise.rounding("llama")
    if place != list(range(-9, 0)):
        assert error(found, attention_oracle.read(pair.plain, ids, rows)) > 0.1, "another place must be another answer"
