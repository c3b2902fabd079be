"""The rows of a memory against plain lists: all that was written, less what a policy or a forget removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.memory.rows_machine import Rows, follow

if TYPE_CHECKING:
    import pytest

KINDS = [
    ("waits", "slabs"),
    ("fifo", "tiers"),
    ("reservoir", "mmap"),
    ("lru", "slabs"),
    ("ttl", "int8"),
    ("published", "fp8"),
    ("grows", "int8 in tiers"),
    ("short", "ram"),
]
"""Every config and every store once."""


def test_every_row_is_where_the_lists_say(record_property: pytest.RecordProperty) -> None:
    record_property("steps", follow(Rows, KINDS, nightly=6_000))
