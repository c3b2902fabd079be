"""Save and read the weights that the rows of each stream were made with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from mplus.memory.engine import Engine
from mplus.memory.sources.recompute import holds_rows, unfit
from mplus.memory.state import StreamState
from mplus.memory.weights_state import MADE_WITH, WeightsState, weights_of
from mplus.stores.base import StoreView


def made_with(states: Sequence[StreamState]) -> dict[str, Any]:
    """Return the entry of a fingerprint: the different states of weights, and the number of each stream's own."""
    sets: list[WeightsState] = []
    numbers: list[int] = []
    for state in states:
        weights = state.weights or WeightsState()
        if weights not in sets:
            sets.append(weights)
        numbers.append(sets.index(weights))
    return {MADE_WITH: {"sets": [weights.facts() for weights in sets], "streams": numbers}}


def with_weights(
    states: Sequence[StreamState],
    stores: Sequence[StoreView],
    fingerprint: Mapping[str, Any],
    engine: Engine,
    where: str | Path,
) -> list[StreamState]:
    """Return streams read from a file with the weights their rows were made with; an older file does not say it.

    Warns where rows have hidden states and the decoder computes with other adapters now: they are projected anew.

    Raises:
        MemoryMismatchError: the rows are keys and values only, which the decoder would make differently now.
    """
    if MADE_WITH not in fingerprint:
        return list(states)
    made = weights_of(fingerprint[MADE_WITH], len(states))
    now = engine.weights()
    known = [now]
    if len(set(map(repr, made))) > 1:  # written for batches in which each row has an adapter of its own
        known += [engine.weights([name]) for name in dict.fromkeys(n for one in made for n in one.adapters.names)]
        known.append(engine.weights([]))
    found: list[StreamState] = []
    others: dict[str, list[int]] = {}
    for row, (state, store, weights) in enumerate(zip(states, stores, made, strict=True)):
        projection, retrieval = weights.of_projection(now), weights.of_retrieval(now)
        stale = bool(store.layout.projected_size and projection) or bool(store.layout.key_size and retrieval)
        if not holds_rows(state, store):
            found.append(evolve(state, weights=weights if stale else now))
        elif store.layout.keeps_hidden:
            found.append(evolve(state, weights=weights if stale else now))
            if stale or projection:
                others.setdefault("; ".join(projection or retrieval), []).append(row)
        else:
            fitting = [one for one in known if not weights.of_projection(one) and not weights.of_retrieval(one)]
            if not fitting:
                raise unfit(weights, now, row, str(where))
            found.append(evolve(state, weights=fitting[0]))
    for difference, rows in others.items():
        warnings.warn(
            f"{where} (batch rows {', '.join(map(str, rows))}): {difference}; its rows have hidden states and are "
            "projected anew",
            stacklevel=5,
        )
    return found
