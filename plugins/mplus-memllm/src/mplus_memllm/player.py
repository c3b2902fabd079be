"""MemLLMPlayer: behaviours of MemLLM in a JSON file, computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mplus.config import JsonValue
from mplus.interop import BehaviourPlayer, Unavailable
from mplus.mechanisms.text.stopping import LateStopping
from mplus_memllm.calls import (
    queries_in,
    read_call,
    results_of,
    resumed,
    triples_in,
    without_calls,
    write_call,
    write_prompt,
)
from mplus_memllm.masks import trained_in_read, trained_in_write
from mplus_memllm.store import Tables, Thresholds


class MemLLMPlayer(BehaviourPlayer):
    """Plays the cases of the system "memllm".

    Example:
        >>> from mplus.interop import replay
        >>> [report] = replay("plugins/mplus-memllm/tests/goldens")
        >>> report.passed()
        True
    """

    system = "memllm"
    quantities = ()

    def compute(self, name: str, given: Mapping[str, JsonValue]) -> JsonValue:
        if name not in BEHAVIOURS:
            raise Unavailable("this behaviour is not known to mplus-memllm")
        return BEHAVIOURS[name](given)


def _queries(given: Any) -> JsonValue:
    found = queries_in(given["body"], strict=given["strict"])
    return None if found is None else [list(query) for query in found]


def _query(given: Any) -> JsonValue:
    tables = Tables.of(given["writes"])
    thresholds = Thresholds(given["entity_distance"], given["relation_distance"], given["score"])
    found = tables.query(
        tuple(given["query"]),
        lambda names: torch.tensor([given["vectors"][name] for name in names], dtype=torch.float64),
        thresholds,
        exact_wins=given["exact"],
    )
    return [[match.score, list(tables.triples[match.row])] for match in found]


def _tables(given: Any) -> JsonValue:
    found = Tables.of(given["writes"])
    return {
        "entities": list(found.entities),
        "relations": list(found.relations),
        "triples": len(found.triples),
    }


def _late(given: Any) -> JsonValue:
    late = LateStopping(given["prompt"], given["delay"])
    for closing, other in given["steps"]:
        if late.step(math.log(closing), math.log(other)):
            break
    return {"cuts": {str(place): score for place, score in late.places.items()}, "cut": late.cut}


BEHAVIOURS: Mapping[str, Callable[[Any], JsonValue]] = {
    "format of a write call": lambda given: write_call(given["triples"]),
    "prompt of a write": lambda given: write_prompt(given["before"], given["sentence"]),
    "parsing what was generated for a write": lambda given: [list(one) for one in triples_in(given["generated"])],
    "format of a read call": lambda given: read_call(given["queries"]),
    "parsing a read call": _queries,
    "parsing a read call, as released": _queries,
    "results in the context": lambda given: results_of(given["names"], given["most"]),
    "an earlier call leaves the context": lambda given: without_calls(given["text"]),
    "resuming after a read": lambda given: resumed(given["context"], given["body"], given["results"]),
    "tokens trained in a write example": lambda given: list(trained_in_write(given["tokens"])),
    "tokens trained in a read example": lambda given: list(trained_in_read(given["tokens"])),
    "query of the store": _query,
    "tables of the store": _tables,
    "late stopping": _late,
}
