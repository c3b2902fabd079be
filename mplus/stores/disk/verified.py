"""VerifiedTensor: a tensor in a mapped file, every block of which is checked when it is first read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from attrs import define, field
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.stores.disk.checksums import Checksums, WeightedSums
from mplus.stores.disk.files import PathAt
from mplus.stores.disk.safetensors_io import TensorSpan

AT_A_TIME = 2**20
"""Bytes checked at a time: so many stay in a processor's cache between one sum and the next. A tensor that has no more
is checked whole where as many rows are read as it has blocks."""


@define(frozen=True)
class Rule:
    """Bounds of a column of whole numbers, by what is known of it elsewhere: from ``least`` to ``most``."""

    least: int
    most: int
    ascending: bool = False

    def __str__(self) -> str:
        """In words."""
        return f"{'ascending ' * self.ascending}numbers from {self.least} to {self.most}"


@define(eq=False)
class VerifiedTensor:
    """Reads rows, and checks the blocks these lie in unless that was done before. For any number of threads.

    Attributes:
        path, name: of the file and of the tensor, for errors.
        span: what the tensor is.
        rows: ``span.shape``, mapped: as it lies in the file, whatever its checksums say. Not to be written to.
        data: ``[nbytes]`` uint8, the same memory.
        checksums: how they are made.
        sums: ``[blocks, k]``, what they were when the file was written.
        good: ``[blocks]`` bool, those that were checked; written to.
        rule: what its numbers must be, besides what was written; None: anything. Blocks hold whole numbers then.
        row_bytes, block_bytes: of a row and of a block.
        whole: whether all blocks were checked.
    """

    path: Path | PathAt
    name: str
    span: TensorSpan
    rows: Tensor
    data: Tensor
    checksums: Checksums
    sums: Tensor
    good: Tensor
    rule: Rule | None = None
    row_bytes: int = field(init=False)
    block_bytes: int = field(init=False)
    whole: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.row_bytes = self.span.row_bytes
        self.block_bytes = self.checksums.block_bytes
        self.whole = not len(self.sums)

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop-1``, where they lie. Raises MemoryFileError: they are not what was written."""
        if not self.whole and stop > start:
            width = self.row_bytes
            self._check_range(start * width // self.block_bytes, -(-stop * width // self.block_bytes))
        return self.rows[start:stop]

    def all(self) -> Tensor:
        """Return everything, where it lies. Raises MemoryFileError as ``read``."""
        if not self.whole:
            self._check_range(0, len(self.sums))
        return self.rows

    def take(self, places: Tensor) -> Tensor:
        """Return copies of the rows at ``places`` (``[n]`` int64), in that order. Raises as ``read``."""
        if not places.shape[0]:
            return self.rows.index_select(0, places)
        copies = self.rows.new_empty(places.shape[0], *self.rows.shape[1:])
        take([(self, places)], copies)
        return copies

    @property
    def by_rows(self) -> bool:
        """True if every row is a block with ``WeightedSums``."""
        return self.block_bytes == self.row_bytes and isinstance(self.checksums, WeightedSums)

    def check(self, places: Tensor) -> None:
        """Check the rows at ``places`` (``[n]`` int64). Raises MemoryFileError as ``read``."""
        width, size = self.row_bytes, self.block_bytes
        if self.whole or not places.shape[0]:
            return
        # So many rows of so small a tensor: to check all of it takes less than to find out which blocks they lie in.
        if self.data.shape[0] <= AT_A_TIME and places.shape[0] >= self.sums.shape[0]:
            self._check_range(0, len(self.sums))
            return
        # Where a row is a block, its place is the number of that block.
        first = last = places
        if width != size:
            begin = places * width
            first, last = begin // size, (begin + width - 1) // size
            if size % width:  # rows may lie in more than one block
                most = -(-width // size) + 1
                first = torch.minimum(first[:, None] + torch.arange(most, device="cpu"), last[:, None]).flatten()
        numbers = first[~self.good[first]]
        if not numbers.shape[0]:
            return
        numbers, full = numbers.unique(), self.data.shape[0] // size
        if int(numbers[-1]) == full:
            self._check_range(full, full + 1)  # a shorter last block
            numbers = numbers[:-1]
        blocks = self.data[: full * size].view(full, size)
        for some in numbers.split(max(1, AT_A_TIME // size)) if numbers.shape[0] else ():
            self._check_data(blocks.index_select(0, some).view(-1), some)

    def faults(self) -> Iterator[int]:
        """Read everything: numbers of the blocks that are not what was written."""
        for first, data in self._in_pieces(0, len(self.sums)):
            found = self.checksums.of(data)
            right = (found == self.sums[first : first + len(found)]).all(1)
            yield from ((~right).nonzero().squeeze(1) + first).tolist()

    def block_span(self, block: int) -> tuple[int, int]:
        """Return the first byte of a block in the tensor, and the one behind its last."""
        begin = block * self.block_bytes
        return begin, min(begin + self.block_bytes, self.data.shape[0])

    def _in_pieces(self, first: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks ``first .. stop-1``, some at a time: the number of the first one, and their bytes."""
        size, step = self.block_bytes, max(1, AT_A_TIME // self.block_bytes)
        for start in range(first, stop, step):
            yield start, self.data[start * size : min(start + step, stop) * size]

    def _check_range(self, first: int, stop: int) -> None:
        for start, data in self._in_pieces(first, stop):
            numbers = slice(start, start - (-data.shape[0] // self.block_bytes))
            if not bool(self.good[numbers].all()):
                self._check_data(data, numbers)

    def _check_data(self, data: Tensor, numbers: Tensor | slice) -> None:
        """Raise MemoryFileError unless ``data``, of the blocks with these numbers, is what was written; note it."""
        right = (self.checksums.of(data) == self.sums[numbers]).all(1)
        if self.rule is not None and bool(right.all()):
            self._check_rule(self.rule, data.view(self.span.dtype), numbers)
        self.note(right, numbers)

    def _check_rule(self, rule: Rule, values: Tensor, numbers: Tensor | slice) -> None:
        """Raise MemoryFileError where ``values``, of ascending ``numbers`` of blocks, break a rule."""
        if isinstance(numbers, slice):
            numbers = torch.arange(numbers.start, numbers.stop, device="cpu")
        broken = int(values.min()) < rule.least or int(values.max()) > rule.most
        if rule.ascending:
            # The blocks that were read need not be neighbours: the first row of each is compared with the row before
            # it, too.
            begins = numbers[numbers > 0] * (self.block_bytes // self.row_bytes)
            broken |= bool((values[1:] <= values[:-1]).any())
            broken |= bool((self.rows[begins] <= self.rows[begins - 1]).any())
        if broken:
            raise MemoryFileError(
                f"{self.path}: tensor {self.name!r} must have {rule}, and has others: it was altered; use another "
                "copy, or save what is sound with `mplus memory repair`"
            )

    def note(self, right: Tensor, numbers: Tensor | slice) -> None:
        """Take in which of the blocks with these numbers (``[n]`` bool) are what was written.

        Raises MemoryFileError unless all are.
        """
        if not bool(right.all()):
            if isinstance(numbers, slice):
                numbers = torch.arange(numbers.start, numbers.stop, device="cpu")
            begin, end = self.block_span(int(numbers[~right][0]))
            width = max(self.row_bytes, 1)
            raise MemoryFileError(
                f"{self.path}: tensor {self.name!r} must have the checksums it was written with, and has another in "
                f"rows {begin // width} to {(end - 1) // width}: it was altered; use another copy, or save what is "
                "sound with `mplus memory repair`"
            )
        self.good[numbers] = True
        self.whole = bool(self.good.all())


def take(parts: Sequence[tuple[VerifiedTensor | Tensor, Tensor]], out: Tensor) -> None:
    """Copy the rows at ``places`` (``[n_i]`` int64) of every part to ``out``, one part behind the other.

    Rows of a ``VerifiedTensor`` are checked: where a row is a block, all copies in one go, since they are at hand.

    Raises:
        MemoryFileError: as ``VerifiedTensor.read``.
    """
    unknown, end = [], 0
    for column, places in parts:
        begin, end = end, end + places.shape[0]
        if isinstance(column, Tensor):
            torch.index_select(column, 0, places, out=out[begin:end])
            continue
        if not column.whole:
            if not column.by_rows:
                column.check(places)
            elif not bool(column.good[places].all()):
                unknown.append((column, places, begin, end))
        torch.index_select(column.rows, 0, places, out=out[begin:end])
    if not unknown:
        return
    first, last = unknown[0], unknown[-1]
    copies = out[first[2] : last[3]].flatten().view(torch.uint8)
    sums = first[0].checksums.of(copies)
    for column, places, begin, end in unknown:
        found = sums[begin - first[2] : end - first[2]]
        column.note((found == column.sums.index_select(0, places)).all(1), places)
