"""What 8 bits make of rows, number by number, and the conformance suite with it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.quantized import QuantizedStore
from mplus.testing.stores import StoreConformance

SMALLEST = {torch.float64: -1022}


def in_8_bits(values: torch.Tensor, form: str = "int8", group: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``[n, w]`` reads back as in float64, and the scale of each number."""
    read, scales = [], []
    for row in values.double().tolist():
        for start in range(0, len(row), group):
            part = row[start : start + group]
            most, largest = max(map(abs, part)), {"int8": 127, "fp8": 448}[form]
            exponent = SMALLEST.get(values.dtype, -126)
            while 2.0**exponent * largest < most:
                exponent += 1
            scale = 2.0**exponent
            codes = [number / scale for number in part]
            nearest = round if form == "int8" else _e4m3  # ties to even, both
            read += [nearest(code) * scale for code in codes]
            scales += [scale] * len(part)
    shape = values.shape
    as_read, of_scale = (torch.tensor(part, dtype=torch.float64).reshape(shape) for part in (read, scales))
    return as_read, of_scale


def _e4m3(number: float) -> float:
    """The nearest of the numbers with 4 significant bits, multiples of 2^-9 at least; ties to even."""
    if number == 0:
        return 0.0
    step = 2.0 ** max(math.floor(math.log2(abs(number))) - 3, -9)
    return round(number / step) * step


class QuantizedConformance(StoreConformance):
    """The suite for a store of 8 bits, with exact expectations."""

    implementation = QuantizedStore
    machines = 6
    options: ClassVar[dict[str, Any]] = {}

    def make(self, layout: StoreLayout) -> QuantizedStore:
        return QuantizedStore(layout, QuantizedStore.Options(**self.options))

    def expected(self, rows: MemoryRows) -> MemoryRows:
        form, group = self.options.get("format", "int8"), self.options.get("group", 64)
        columns = rows.columns()
        for name in ("hidden", "projected", "key"):
            if name in columns and (name != "key" or self.options.get("keys", True)):
                columns[name] = in_8_bits(columns[name], form, group)[0].to(columns[name].dtype)
        return MemoryRows.of(columns)
