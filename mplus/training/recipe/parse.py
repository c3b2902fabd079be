"""parse_recipe: plain data, as TOML holds it, to a ``Recipe`` whose settings keep every rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from mplus.config import ADAPTERS, AdapterConfig, JsonValue, MPlusConfig, structure
from mplus.errors import ConfigError
from mplus.training.objectives.losses import RetrieverLoss
from mplus.training.recipe.checks import check
from mplus.training.recipe.recipe import Entry, Recipe, Revisit, Stage, Until, Validation
from mplus.training.recipe.tables import Checkpoints, DataSet, Metrics, ModelTable, Optimizer, error_prefix


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain data.

    Raises:
        ConfigError, UnknownNameError: a field, or fields together, break a rule; the message begins with the place.
    """
    with error_prefix(f"recipe {table.get('name', '?')!r}" if isinstance(table, Mapping) else "recipe"):
        values = dict(table) if isinstance(table, Mapping) else table
        recipe = structure(Recipe, _read_tables(values, READERS))
        check(recipe)
    return recipe


def _read_tables(values: Any, readers: Mapping[str, Callable[[Any], Any]]) -> Any:
    """Replace the tables of ``values`` that have a reader by what it makes of them."""
    for key, make in readers.items():
        if isinstance(values, dict) and values.get(key) is not None:
            with error_prefix(key):
                values[key] = make(values[key])
    return values


def _tables(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reader of a list of tables; an error begins with the place of its table."""

    def read(values: Any) -> Any:
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"must be a list of at least one table, got {values!r}")
        found = []
        for place, value in enumerate(values):
            named = f" ({value['name']})" if isinstance(value, Mapping) and "name" in value else ""
            with error_prefix(f"{place}{named}"):
                found.append(make(value))
        return tuple(found)

    return read


def _with_objectives(cls: Any, **readers: Any) -> Callable[[Any], Any]:
    readers = {"objectives": _tables(Entry.of), **readers}

    def read(table: Any) -> Any:
        return structure(cls, _read_tables(dict(table) if isinstance(table, Mapping) else table, readers))

    return read


def _table_of(cls: Any) -> Callable[[Any], Any]:
    return lambda table: structure(cls, table)


def _data(tables: Any) -> dict[str, DataSet]:
    if not isinstance(tables, Mapping):
        raise ConfigError(f"must be a table of data sets by name, got {tables!r}")
    found = {}
    for name, table in tables.items():
        with error_prefix(name):
            found[name] = DataSet.of(table)
    return found


def _memory(table: Mapping[str, JsonValue]) -> MPlusConfig:
    """Read the configuration of the memory; where it says nothing of adapters there are the default ones to train."""
    config = MPlusConfig.from_dict(table)
    # Not the very object: a mechanism that needs no adapters goes without that one (see ``mplus.config.ADAPTERS``).
    return attrs.evolve(config, adapters=AdapterConfig()) if config.adapters is ADAPTERS else config


READERS: dict[str, Callable[[Any], Any]] = {
    "model": ModelTable.of,
    "memory": _memory,
    "optimizer": _table_of(Optimizer),
    "checkpoints": _table_of(Checkpoints),
    "metrics": _table_of(Metrics),
    "data": _data,
    "stages": _tables(
        _with_objectives(
            Stage, revisit=_table_of(Revisit), retriever_loss=_table_of(RetrieverLoss), until=_table_of(Until)
        )
    ),
    "validation": _with_objectives(Validation),
}
"""Readers of the tables of a recipe."""
