"""Numbers in 8 bits: groups of a row's numbers share a scale, a power of two."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import define
from torch import Tensor

from mplus.errors import NonFiniteError

ROWS = 16_384
"""Rows that are converted at a time."""


@define(frozen=True)
class Format:
    """A form in 8 bits.

    Attributes:
        largest: the largest number a code stands for, before its scale.
        codes: dtype in which codes are kept; that of ``numbers`` cannot be indexed everywhere.
        numbers: dtype of the codes as numbers.
    """

    largest: float
    codes: torch.dtype
    numbers: torch.dtype


FORMATS: Mapping[str, Format] = {
    "int8": Format(127.0, torch.int8, torch.int8),
    "fp8": Format(448.0, torch.uint8, torch.float8_e4m3fn),
}


def groups_of(width: int, group: int) -> int:
    """Return the number of groups that a row of ``width`` numbers has; the last one may be smaller."""
    return -(-width // group)


@torch.no_grad()
def quantised(values: Tensor, form: Format, group: int) -> tuple[Tensor, Tensor]:
    """Return codes, and for each group the exponent e of the smallest scale ``2 ** e`` that no code outgrows.

    With a power of two for a scale, what reads back is exact in every floating dtype of at least 8 significant bits,
    and quantising it again changes nothing; the price is a scale up to twice as large as it would have to be.

    Args:
        values: ``[n, w]`` floating.
        form: of the codes.
        group: numbers that share a scale.

    Returns:
        ``[n, w]`` codes and ``[n, groups]`` int16 exponents.

    Raises:
        NonFiniteError: there is NaN or Inf among them.
    """
    count, width = values.shape
    codes = torch.empty(count, width, dtype=form.codes, device=values.device)
    exponents = torch.empty(count, groups_of(width, group), dtype=torch.int16, device=values.device)
    pieces = zip(values.split(ROWS), codes.split(ROWS), exponents.split(ROWS), strict=True)
    for piece, code, exponent in pieces:
        grouped = _grouped(piece.to(arithmetic_of(piece.dtype)), group)
        most = grouped.abs().amax(-1)
        if not bool(torch.isfinite(most).all()):
            raise NonFiniteError(
                "rows of a quantised store must be finite, got NaN or Inf: 8 bits cannot say that; nothing was stored"
            )
        exponent.copy_(_exponents(most / form.largest))
        scaled = grouped / _scales(exponent, grouped.dtype)[..., None]
        if form.numbers == torch.int8:
            scaled = scaled.round_()
        numbers = scaled.clamp_(-form.largest, form.largest).to(form.numbers).view(form.codes)
        code.copy_(numbers.flatten(1)[:, :width])
    return codes, exponents


@torch.no_grad()
def restored(
    codes: Tensor, exponents: Tensor, form: Format, group: int, dtype: torch.dtype, arithmetic: torch.dtype
) -> Tensor:
    """Return ``[n, w]`` numbers in ``dtype``.

    Args:
        codes, exponents: as ``quantised`` returns them.
        form, group: as it got them.
        dtype: of the result.
        arithmetic: float64 where float64 was quantised, float32 elsewhere.
    """
    width = codes.shape[1]
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    largest = torch.finfo(dtype).max
    for value, code, exponent in zip(values.split(ROWS), codes.split(ROWS), exponents.split(ROWS), strict=True):
        grouped = _grouped(code.view(form.numbers).to(arithmetic), group)
        made = (grouped * _scales(exponent, arithmetic)[..., None]).flatten(1)[:, :width]
        # A number near the largest of its dtype may have been rounded up beyond it, and would come back as Inf.
        value.copy_(made.clamp_(-largest, largest))
    return values


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of ``dtype`` are quantised."""
    return torch.promote_types(dtype, torch.float32)


def _grouped(values: Tensor, group: int) -> Tensor:
    """Reshape ``[n, w]`` to ``[n, groups, group]``, with zeros behind."""
    missing = -values.shape[1] % group
    values = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return values.reshape(values.shape[0], values.shape[1] // group, group)


def _exponents(values: Tensor) -> Tensor:
    """Return the smallest whole e with ``2 ** e`` not below a value, from the bits of normal numbers."""
    words, fraction, bias = _bits(values.dtype)
    # All ones added to the fraction carry into the exponent unless the fraction is 0: a power of two stays, all else
    # goes up. Zero and subnormal numbers get the least exponent that has a normal number, 1.
    up = torch.bitwise_right_shift(values.view(words) + (2**fraction - 1), fraction)
    return (up.clamp(min=1) - bias).to(torch.int16)


def _scales(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``2 ** e``, exactly."""
    words, fraction, bias = _bits(dtype)
    # The bits of a power of two: its exponent, and a fraction of 0.
    return torch.bitwise_left_shift(exponents.to(words) + bias, fraction).view(dtype)


def _bits(dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """Return integers of the same size, bits of the fraction, and what is added to exponents."""
    return (torch.int64, 52, 1023) if dtype == torch.float64 else (torch.int32, 23, 127)
