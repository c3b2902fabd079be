"""Writes that were given an id: how far each has come, so that the same one is not made twice."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from attrs import define, field
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.format.structure import LARGEST
from mplus.memory.sources.text_columns import bytes_of, check_texts, coded, texts_in

DIGEST = 32
"""Bytes of a digest."""


@define(frozen=True, kw_only=True)
class WriteRecord:
    """A write to one stream under an id.

    Attributes:
        write_id: what the caller called it.
        source: number of its source.
        digest: SHA-256 of the text.
        total: tokens of all of the text.
        tokens, chunks, dropped, evicted: what was written of it so far, as in ``WriteReport``.
        seconds: that this took, of all calls together.
    """

    write_id: str
    source: int
    digest: bytes
    total: int
    tokens: int = 0
    chunks: int = 0
    dropped: int = 0
    evicted: int = 0
    seconds: float = 0.0

    @property
    def is_finished(self) -> bool:
        """Return whether all of the text was written."""
        return self.tokens >= self.total


COUNTS = ("source", "total", "tokens", "chunks", "dropped", "evicted")
WRITE_DTYPES = {
    "id": torch.uint8,
    "id_length": torch.int64,
    "digest": torch.uint8,
    **dict.fromkeys(COUNTS, torch.int64),
    "seconds": torch.float64,
}
"""Columns of a log: a value for each record; ids are UTF-8, one behind the other; a digest has ``DIGEST`` bytes."""


@define(frozen=True, eq=False)
class WriteLog:
    """The writes to one stream that were given an id, in order. Immutable."""

    records: Mapping[str, WriteRecord] = field(factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[WriteRecord]:
        return iter(self.records.values())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, WriteLog) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def get(self, write_id: str) -> WriteRecord | None:
        """Return the record of a write, if there is one."""
        return self.records.get(write_id)

    def noting(self, records: Iterable[WriteRecord]) -> WriteLog:
        """Return this log with further records, or others in the place of those of the same ids."""
        return WriteLog({**self.records, **{record.write_id: record for record in records}})

    def without(self, source: int) -> WriteLog:
        """Return this log without the writes to one source."""
        left = {name: record for name, record in self.records.items() if record.source != source}
        return self if len(left) == len(self.records) else WriteLog(left)

    def lacking(self, ids: Collection[str]) -> WriteLog:
        """Return this log without the writes of these ids."""
        return WriteLog({name: record for name, record in self.records.items() if name not in ids})

    def changed_since(self, earlier: WriteLog) -> tuple[list[WriteRecord], list[str]]:
        """Return records that are new or changed since ``earlier``, and ids that only ``earlier`` has."""
        if self is earlier:
            return [], []
        changed = [record for record in self if record is not earlier.records.get(record.write_id)]
        return changed, [name for name in earlier.records if name not in self.records]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by name (``WRITE_DTYPES``), for a file; nothing where there are no records."""
        records = list(self)
        if not records:
            return {}
        columns = {name: torch.tensor([getattr(record, name) for record in records]) for name in COUNTS}
        columns["seconds"] = torch.tensor([record.seconds for record in records], dtype=torch.float64)
        columns["digest"] = bytes_of(b"".join(record.digest for record in records))
        columns["id"], columns["id_length"] = coded([record.write_id for record in records])
        return columns

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], known: Tensor) -> WriteLog:
        """Make a log of what ``tensors`` returned, of a stream with the sources ``known`` (``[n]`` int64).

        Raises MemoryMismatchError where they do not fit together.
        """
        if not tensors:
            return WriteLog()
        _check(tensors, known)
        ids = texts_in(tensors["id"], tensors["id_length"])
        digests = bytes(tensors["digest"].contiguous().numpy())
        columns = {name: tensors[name].tolist() for name in (*COUNTS, "seconds")}
        records: dict[str, WriteRecord] = {}
        for place, name in enumerate(ids):
            if name is None or name in records:
                raise MemoryMismatchError(f"ids of writes must be texts that differ, got {name!r}")
            facts = {column: values[place] for column, values in columns.items()}
            digest = digests[place * DIGEST : (place + 1) * DIGEST]
            records[name] = WriteRecord(write_id=name, digest=digest, **facts)
        return WriteLog(records)


def _check(tensors: Mapping[str, Tensor], known: Tensor) -> None:
    if tensors.keys() != WRITE_DTYPES.keys():
        raise MemoryMismatchError(f"writes must have the columns {sorted(WRITE_DTYPES)}, got {sorted(tensors)}")
    count = tensors["id_length"].shape
    for name, dtype in WRITE_DTYPES.items():
        column = tensors[name]
        if column.dtype != dtype or column.dim() != 1 or (name not in ("id", "digest") and column.shape != count):
            raise MemoryMismatchError(f"writes.{name} must be {dtype} [n], got {column.dtype} {list(column.shape)}")
    if len(tensors["digest"]) != DIGEST * len(tensors["id_length"]):
        raise MemoryMismatchError(f"writes.digest must have {DIGEST} bytes for each of {len(tensors['id_length'])}")
    for name in COUNTS:
        if bool(((tensors[name] < 0) | (tensors[name] > LARGEST)).any()):
            raise MemoryMismatchError(f"writes.{name} must be from 0 to {LARGEST}, got another number")
    if not bool((tensors["seconds"] >= 0).all()) or bool(tensors["seconds"].isinf().any()):
        raise MemoryMismatchError("writes.seconds must be finite, and at least 0")
    if bool((tensors["tokens"] > tensors["total"]).any()):
        raise MemoryMismatchError("writes.tokens must be at most writes.total")
    if not bool(torch.isin(tensors["source"], known).all()):
        raise MemoryMismatchError("the sources of writes must be sources of the stream")
    check_texts("writes.id", tensors["id"], tensors["id_length"])
