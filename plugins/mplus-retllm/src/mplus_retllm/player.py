"""RETLLMPlayer: behaviours of RET-LLM in a JSON file, computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mplus.config import JsonValue
from mplus.interop import BehaviourPlayer, Unavailable
from mplus_retllm.calls import first_open_read, response, writes_in
from mplus_retllm.table import Neighbours, bucket, matches


class RETLLMPlayer(BehaviourPlayer):
    """Plays the cases of the system "retllm".

    Example:
        >>> from mplus.interop import replay
        >>> [report] = replay("plugins/mplus-retllm/tests/goldens")
        >>> report.passed()
        True
    """

    system = "retllm"
    quantities = ()

    def compute(self, name: str, given: Mapping[str, JsonValue]) -> JsonValue:
        if name not in BEHAVIOURS:
            raise Unavailable("this behaviour is not known to mplus-retllm")
        return BEHAVIOURS[name](given)


def _writes(given: Any) -> JsonValue:
    return [list(triple) for triple in writes_in(given["text"])]


def _open_read(given: Any) -> JsonValue:
    found = first_open_read(given["text"])
    return None if found is None else [found.place, None if found.query is None else list(found.query)]


def _query(given: Any) -> JsonValue:
    vectors, planes = given["vectors"], torch.tensor([given["planes"]], dtype=torch.float32)
    neighbours = Neighbours(lambda texts: torch.tensor([vectors[text] for text in texts]), lambda width: planes)
    return [given["writes"][number] for number in matches(given["writes"], tuple(given["query"]), neighbours)]


def _bucket(given: Any) -> JsonValue:
    planes, vector = (torch.tensor(given[name], dtype=torch.float32) for name in ("planes", "vector"))
    sides: list[JsonValue] = bucket(planes, vector).tolist()
    return sides


BEHAVIOURS: Mapping[str, Callable[[Any], JsonValue]] = {
    "writes in a text": _writes,
    "the first open read in a text": _open_read,
    "response": lambda given: response(given["triples"]),
    "query of the table": _query,
    "bucket of a vector": _bucket,
}
