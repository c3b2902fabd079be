"""Journal records of format versions 1 and 2.

They have the tensors ``<i>.stm.<layer>.<column>``, likewise ``pending``, ``<i>.newest.<layer>`` and
``<i>.counter.<name>``, and sources as a list in their facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mplus.memory.format.earlier import renamed
from mplus.memory.sources.source import Source, encoded


def in_present_form(
    facts: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], next_numbers: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A record's facts and tensors as ``mplus.memory.directory.record`` has them.

    Args:
        facts, tensors: as they stand in the record.
        next_numbers: of each stream, the number that its next new source gets.
    """
    found = {renamed(f"stream.{name}").removeprefix("stream."): tensor for name, tensor in tensors.items()}
    present = {}
    for row, fact in facts.items():
        changed = dict(fact)
        if "clock" in fact:
            sources = {number: Source(*entry) for number, *entry in changed.pop("sources")}
            if sources:
                found.update({f"{row}.sources.{name}": column for name, column in encoded(sources).items()})
            counters = [f"counter.{name}" for name in changed.pop("counters")]
            newest = [name for name in (n.removeprefix(f"{row}.state.") for n in found) if name.startswith("newest.")]
            changed |= {"tensors": [*newest, *counters], "gone": []}
            changed["next_source"] = max([next_numbers[int(row)], *(number + 1 for number in sources)])
        present[row] = changed
    return present, found
