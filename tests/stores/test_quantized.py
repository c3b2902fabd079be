"""Rows in 8 bits: what they read back as, how wrong that is, and how small they are."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import ConfigError, MemoryMismatchError, NonFiniteError
from mplus.stores import quantized
from mplus.stores.base import StoreLayout
from mplus.stores.quantized import QuantizedStore
from mplus.stores.quantizing import FORMATS, arithmetic_of, quantised, restored
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.strategies import CONFORMANCE
from tests.references.quantized import QuantizedConformance, in_8_bits

LAYOUT = StoreLayout(layers=1, hidden_size=16, key_size=8, projected_size=24)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class TestFp8(QuantizedConformance):
    options: ClassVar = {"format": "fp8", "group": 2}
    machines = 2


class TestKeysAsTheyAre(QuantizedConformance):
    options: ClassVar = {"keys": False, "group": 1, "inner": {"name": "ram", "slab_rows": 4}}
    machines = 2


class TestInFiles(QuantizedConformance):
    options: ClassVar = {"group": 2, "inner": {"name": "mmap", "bytes_in_memory": 400}}
    machines = 2


def there_and_back(values: torch.Tensor, form: str, group: int) -> torch.Tensor:
    codes, exponents = quantised(values, FORMATS[form], group)
    return restored(codes, exponents, FORMATS[form], group, values.dtype, arithmetic_of(values.dtype))


@st.composite
def matrices(draw):
    dtype = draw(st.sampled_from(DTYPES))
    bits = {torch.float64: 64, torch.float16: 16}.get(dtype, 32)
    values = st.floats(width=bits, allow_nan=False, allow_infinity=False)
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    row = st.lists(values, min_size=width, max_size=width)
    drawn = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64)
    return drawn.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


class TestNumbers:
    @pytest.mark.parametrize("form", ["int8", "fp8"])
    @CONFORMANCE
    @given(values=matrices(), group=st.integers(1, 10))
    def test_the_error_is_bounded_and_the_reference_agrees(self, form, values, group):
        """Denormal, huge and zero rows included."""
        read = there_and_back(values, form, group)
        expected, scales = in_8_bits(values, form, group)
        largest = torch.finfo(values.dtype).max
        torch.testing.assert_close(read, expected.clamp(-largest, largest).to(values.dtype), rtol=0, atol=0)
        assert torch.isfinite(read).all()
        exact = values.double()
        bound = scales / 2 if form == "int8" else torch.maximum(exact.abs() / 16, scales / 1024)
        # A result in half precision is rounded to a number that is no farther from x than the bound allows, or equal.
        assert ((read.double() - exact).abs() <= bound * (1 + 1e-12)).all()

    @pytest.mark.parametrize("form", ["int8", "fp8"])
    @CONFORMANCE
    @given(values=matrices(), group=st.integers(1, 10))
    def test_what_was_read_can_be_stored_again_without_a_change(self, form, values, group):
        read = there_and_back(values, form, group)
        assert torch.equal(there_and_back(read, form, group), read)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("form", ["int8", "fp8"])
    def test_the_scale_is_the_smallest_power_of_two_that_is_enough(self, form, dtype):
        largest = FORMATS[form].largest
        for most, exponent in ((largest, 0), (largest * 1.01, 1), (largest / 2, -1), (largest / 2 * 1.01, 0)):
            values = torch.tensor([[most, -most / 3]], dtype=torch.float64).to(dtype)
            _, exponents = quantised(values, FORMATS[form], 2)
            expected = math.ceil(math.log2(float(values.max()) / largest))
            assert exponents.tolist() == [[expected]]
            assert abs(expected - exponent) <= (0 if dtype in (torch.float32, torch.float64) else 1)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["hidden", "projected", "key"])
    @pytest.mark.parametrize("form", ["int8", "fp8"])
    def test_what_is_not_finite_is_refused(self, form, name, bad):
        store = QuantizedStore(LAYOUT, QuantizedStore.Options(format=form))
        rows = draw_rows(LAYOUT, 3, 1)
        store.append(0, rows)
        rows.columns()[name][1, 2] = bad
        with pytest.raises(NonFiniteError, match="must be finite"):
            store.append(0, rows)
        assert store.count(0) == 3

    def test_many_rows_are_converted_piece_by_piece(self):
        values = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0))
        read = there_and_back(values, "int8", 2)
        for place in (0, 16_383, 16_384, 39_999):
            one = values[place : place + 1]
            assert torch.equal(read[place : place + 1], there_and_back(one, "int8", 2))


class TestSize:
    def test_llama_3_1_8b(self):
        """8 key and value heads of width 128, keys of width 256: with birth, source and exponents."""
        ours = StoreLayout(
            layers=32, hidden_size=4096, key_size=256, dtype=torch.bfloat16, projected_size=2048, keeps_hidden=False
        )
        published = 4096 * 2 + 256 * 4
        assert ours.row_bytes == 2 * 2048 + 2 * 256 + 16
        for form in FORMATS:
            kept = QuantizedStore(ours, QuantizedStore.Options(format=form)).coding.inner
            assert kept.row_bytes == 2048 + 256 + 16 + 2 * (32 + 4)
            assert kept.row_bytes <= 0.56 * ours.row_bytes
            assert kept.row_bytes <= 0.30 * published

    def test_nbytes_are_those_of_what_is_kept(self):
        layout = attrs.evolve(LAYOUT, projected_size=2048, dtype=torch.bfloat16, keeps_hidden=False)
        plain, small = RamStore(layout), QuantizedStore(layout)
        rows = draw_rows(layout, 200, 1)
        for store in (plain, small):
            store.append(0, rows)
        (slab,) = small.inner.slab_layers[0].slabs
        columns = slab.block.columns
        assert small.nbytes == sum(column.numel() * column.element_size() for column in columns.values())
        assert {name for name, column in columns.items() if column.dtype == torch.int8} == {"projected", "key"}
        assert small.nbytes < 0.56 * plain.nbytes


class TestStore:
    def test_reading_key_by_key_decodes_one_piece_at_a_time(self):
        store = QuantizedStore(LAYOUT, QuantizedStore.Options(inner={"name": "ram", "slab_rows": 8}))
        rows = draw_rows(LAYOUT, 30, 1)
        store.append(0, rows)
        chunks = store.chunks(0, "key", "birth")
        assert len(chunks) > 2
        assert all(set(chunk.columns) == {"key", "birth"} for chunk in chunks)
        expected, _ = in_8_bits(rows.key)
        assert torch.equal(torch.cat([chunk.columns["key"] for chunk in chunks]).double(), expected)
        with pytest.raises(KeyError, match="hidden"):
            chunks[0].columns["hidden"]
        assert "hidden" not in chunks[0].columns
        decoded = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantized, "restored", lambda *arguments: decoded.append(arguments))
            assert "key" in chunks[0].columns
            assert decoded == [], "asking whether it is there computes nothing"

    def test_codes_survive_a_change_of_dtype(self):
        store = QuantizedStore(LAYOUT)
        store.append(0, draw_rows(LAYOUT, 5, 1))
        before = store.gather(0, store.ids(0)).hidden
        back = store.to(dtype=torch.bfloat16).to(dtype=torch.float32)
        assert torch.equal(back.gather(0, store.ids(0)).hidden, before)
        half = store.to(dtype=torch.float16)
        assert torch.equal(half.gather(0, store.ids(0)).hidden, before.half())

    def test_large_numbers_of_float64_do_not_fold_over(self):
        layout = StoreLayout(layers=1, hidden_size=2, dtype=torch.float64)
        store = QuantizedStore(layout)
        store.append(0, draw_rows(layout, 1, 1).replace(hidden=torch.tensor([[1e300, -2e300]], dtype=torch.float64)))
        read = store.to(dtype=torch.float32).gather(0, store.ids(0)).hidden
        largest = torch.finfo(torch.float32).max
        assert read.tolist() == [[largest, -largest]]

    def test_a_snapshot_of_another_coding_is_refused(self):
        store = QuantizedStore(LAYOUT)
        for other in (QuantizedStore(LAYOUT, QuantizedStore.Options(format="fp8")), RamStore(LAYOUT)):
            with pytest.raises(MemoryMismatchError, match="snapshot of this store"):
                store.restore(other.snapshot())

    @pytest.mark.parametrize(
        "options",
        [{"format": "int4"}, {"group": 0}, {"keys": 1}, {"inner": 3}],
        ids=["format", "group", "keys", "inner"],
    )
    def test_options_are_checked(self, options):
        with pytest.raises(ConfigError):
            QuantizedStore.Options(**options)


def test_codes_and_exponents_go_to_files_and_come_back(tmp_path):
    inner = {"name": "mmap", "directory": str(tmp_path), "bytes_in_memory": 1}
    store = QuantizedStore(LAYOUT, QuantizedStore.Options(inner=inner))
    rows, twin = draw_rows(LAYOUT, 9, 1), QuantizedStore(LAYOUT)
    for one in (store, twin):
        one.append(0, rows)
    assert list(tmp_path.iterdir())
    for name, column in store.gather(0, store.ids(0)).columns().items():
        assert torch.equal(column, twin.gather(0, twin.ids(0)).columns()[name])


class TestColumnsOfOthers:
    def test_a_name_that_a_scale_has_is_refused(self):
        layout = attrs.evolve(LAYOUT, extra=(("hidden_exponent", (1,), torch.int16),))
        with pytest.raises(ConfigError, match=r"without columns .*hidden_exponent.*, got \['hidden_exponent'\]"):
            QuantizedStore(layout)

    def test_8_bits_are_not_quantised_again(self):
        with pytest.raises(ConfigError, match="rows in 8 bits cannot be quantised again"):
            QuantizedStore(LAYOUT, QuantizedStore.Options(inner={"name": "quantized"}))
