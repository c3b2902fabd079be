"""A memory that answers calls: a table of triples, and a decoder that says what a test wants it to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mplus.mechanisms import Recalled, TextMechanism

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mplus.mechanisms import Ask, Entry


class Triples(TextMechanism):
    """Keeps "Ada|office|room 12" as a triple, and answers "[find Ada|office]" with the newest third field."""

    name = "triples"
    opens = "[find "
    closes = "]"

    def write(self, entries: Sequence[Entry], passage: str, before: str, ask: Ask) -> Sequence[tuple[str, ...]]:
        known = {entry.fields for entry in entries}
        found = [tuple(line.split("|")) for line in passage.splitlines()]
        return [one for one in dict.fromkeys(found) if len(one) == 3 and one not in known]

    def answer(self, entries: Sequence[Entry], call: str, ask: Ask) -> Recalled | None:
        asked = tuple(call.split("|"))
        found = [entry for entry in entries if entry.fields[:2] == asked]
        return Recalled(f" {found[-1].fields[2]}.", (found[-1],)) if found else None


class Script:
    """A logits processor that lets a decoder say one token after the other, whatever is done with them.

    Attributes:
        seen: the ids that the decoder saw when it said each of them.
    """

    def __init__(self, tokens: Sequence[int], then: int) -> None:
        self.tokens, self.then = list(tokens), then
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = len(self.seen)
        self.seen.append(input_ids[0].tolist())
        found = torch.full_like(scores, -1e9)
        found[:, self.then] = -1e8  # where the token that comes next must not
        found[:, self.tokens[at] if at < len(self.tokens) else self.then] = 0.0
        return found
