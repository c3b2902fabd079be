"""Reading of recipes: by name, as files and as plain data, with settings changed from outside, and as dry runs."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import attrs
from attrs import define, field

from mplus.config import ADAPTERS, AdapterConfig, JsonValue, MPlusConfig, structure
from mplus.errors import ConfigError, UnknownNameError
from mplus.training.data.options import as_texts
from mplus.training.objectives.losses import RetrieverLoss
from mplus.training.recipe import RECIPES
from mplus.training.recipe.checks import check
from mplus.training.recipe.recipe import Entry, Recipe, Revisit, Stage, Until, Validation
from mplus.training.recipe.tables import Checkpoints, DataSet, Metrics, ModelTable, Optimizer, as_table, error_prefix

T = TypeVar("T")
PartT = TypeVar("PartT", bound="Part")

DRY_RUN = "dry_run"
"""Table of a recipe that says how to try it at tiny size: ``remove``, a list of settings, and ``set``, a table."""


@define(frozen=True, eq=False)
class RecipeFile:
    """A recipe, and the text it was read from (None where it was given as plain data)."""

    recipe: Recipe
    text: str | None = None


@define(frozen=True, kw_only=True)
class _DryRun:
    """Settings that are removed, and others that are set, to try a recipe at tiny size."""

    set: dict[str, JsonValue] = field(factory=dict)
    remove: tuple[str, ...] = field(default=(), converter=as_texts)


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or that of a recipe of mplus or of another package by its name.

    Raises:
        UnknownNameError: there is none.
        DuplicateNameError, PluginError: see ``NameRegistry.get``.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = RECIPES.names()
    if str(name) in known:
        return RECIPES.get(str(name))
    near = difflib.get_close_matches(str(name), known)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known recipes: {', '.join(known)}."
    raise UnknownNameError(
        f"a recipe must be a file or the name of a shipped one, got {str(name)!r}; {hint} A package announces others "
        f"in the entry-point group {RECIPES.group!r}"
    )


def read_recipe(
    recipe: str | Path | Mapping[str, JsonValue] | Recipe,
    *,
    settings: Mapping[str, JsonValue] | None = None,
    steps: int | None = None,
    dry_run: bool = False,
) -> RecipeFile:
    """Read a recipe and change it.

    Args:
        recipe: a file, the name of a recipe (``RECIPES``), or its content.
        settings: dotted path -> value, as ``{"optimizer.learning_rate": 1e-4, "stages.0.steps": 10}``; ``*`` stands
            for every element of a list.
        steps: the most steps of each stage.
        dry_run: apply the recipe's table ``dry_run`` first.

    Raises:
        UnknownNameError: no such recipe, or it names something that nobody registered.
        ConfigError: it is no TOML, a path leads nowhere, or settings break a rule.
    """
    text = None
    if isinstance(recipe, Recipe):
        table: dict[str, JsonValue] = recipe.to_dict()
    elif isinstance(recipe, Mapping):
        table = copy.deepcopy(dict(recipe))
    else:
        path = find_recipe(recipe)
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} must be valid TOML: {error}") from error
    small = table.pop(DRY_RUN, None)
    if dry_run:
        if small is None:
            raise ConfigError(f"recipe {table.get('name', '?')!r} must have a table [dry_run] to be tried at tiny size")
        with error_prefix(DRY_RUN):
            changes = structure(_DryRun, as_table(small, "dry_run"))
            apply_settings(table, changes.set, changes.remove)
    apply_settings(table, settings or {})
    if steps is not None:
        _cap_steps(table, steps)
    return RecipeFile(parse_recipe(table), text)


def apply_settings(table: dict[str, JsonValue], settings: Mapping[str, JsonValue], remove: Iterable[str] = ()) -> None:
    """Remove settings of a recipe's table, then set others, in place. Raises ConfigError when a path leads nowhere."""
    for path in remove:
        for holder, key in _targets(table, path, path.split(".")):
            if isinstance(holder, dict) and key not in holder:
                raise ConfigError(f"{path!r} must be a setting of the recipe to be removed")
            del holder[key]
    for path, value in settings.items():
        for holder, key in _targets(table, path, path.split(".")):
            holder[key] = copy.deepcopy(value)


def _targets(holder: JsonValue, path: str, keys: list[str]) -> list[tuple[Any, Any]]:
    """Return the tables and lists that ``path`` ends in, with its last key there."""
    key, rest = keys[0], keys[1:]
    if isinstance(holder, dict):
        return _targets(holder.setdefault(key, {}), path, rest) if rest else [(holder, key)]
    if not isinstance(holder, list):
        raise ConfigError(f"{path!r} must be a path through tables of the recipe, which ends before {key!r}")
    if key != "*" and not (key.isdecimal() and int(key) < len(holder)):
        raise ConfigError(f"{path!r} must have a number below {len(holder)} or * where it has {key!r}")
    places = range(len(holder)) if key == "*" else [int(key)]
    if not rest:
        return [(holder, place) for place in places]
    return [found for place in places for found in _targets(holder[place], path, rest)]


def _cap_steps(table: dict[str, JsonValue], steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be a whole number of at least 1, got {steps!r}")
    stages = table.get("stages", ())
    for stage in stages if isinstance(stages, list) else ():  # what is none is refused later, with its place
        most = stage.get("steps") if isinstance(stage, dict) else None
        if isinstance(most, int):
            stage["steps"] = most = min(most, steps)
            if isinstance(stage.get("until"), dict):
                stage["until"]["window"] = min(stage["until"].get("window", 20), most)


def differences(then: JsonValue, now: JsonValue, where: str = "") -> list[str]:
    """Return the differences of two recipes' plain data: ``"optimizer.learning_rate: 0.1 then, 0.2 now"``."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = sorted(then.keys() | now.keys())
        pairs = [(f"{where}.{key}" if where else str(key), then.get(key), now.get(key)) for key in keys]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = [(f"{where}.{place}", *pair) for place, pair in enumerate(zip(then, now, strict=True))]
    else:
        return [] if then == now else [f"{where}: {then!r} then, {now!r} now"]
    return [found for name, one, other in pairs for found in differences(one, other, name)]


Part: TypeAlias = (
    "ModelTable | MPlusConfig | Optimizer | Checkpoints | Metrics | DataSet | Stage | Revisit | RetrieverLoss | Until"
    " | Validation | Entry | tuple[Part, ...] | dict[str, DataSet]"
)
"""What the class of a recipe has for one of its tables."""
TableReader = Callable[[JsonValue], Part]
"""Makes it of the table."""


def parse_recipe(table: Mapping[str, JsonValue]) -> Recipe:
    """Build a recipe from plain data.

    Raises:
        ConfigError, UnknownNameError: a field, or fields together, break a rule; the message begins with the place.
    """
    with error_prefix(f"recipe {table.get('name', '?')!r}" if isinstance(table, Mapping) else "recipe"):
        recipe = _read(Recipe, table, READERS)
        check(recipe)
    return recipe


def _read(cls: type[T], table: JsonValue, readers: Mapping[str, TableReader]) -> T:
    """Build ``cls`` from a table of which some fields are tables with a reader of their own."""
    values, parts = dict(as_table(table, cls.__name__)), dict[str, Part]()
    for key, make in readers.items():
        if values.get(key) is not None:
            with error_prefix(key):
                parts[key] = make(values[key])
    return structure(cls, {name: parts.get(name, value) for name, value in values.items()})


def _table_of(cls: type[PartT], **readers: TableReader) -> Callable[[JsonValue], PartT]:
    """Return a reader of a table of the fields of ``cls``."""
    return lambda table: _read(cls, table, readers)


def _tables(make: Callable[[JsonValue], PartT]) -> Callable[[JsonValue], tuple[PartT, ...]]:
    """Return a reader of a list of tables; an error begins with the place of its table."""

    def read(values: JsonValue) -> tuple[PartT, ...]:
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"must be a list of at least one table, got {values!r}")
        found = []
        for place, value in enumerate(values):
            named = f" ({value['name']})" if isinstance(value, Mapping) and "name" in value else ""
            with error_prefix(f"{place}{named}"):
                found.append(make(value))
        return tuple(found)

    return read


def _data(tables: JsonValue) -> dict[str, DataSet]:
    if not isinstance(tables, Mapping):
        raise ConfigError(f"must be a table of data sets by name, got {tables!r}")
    found = {}
    for name, table in tables.items():
        with error_prefix(name):
            found[name] = DataSet.of(table)
    return found


def _memory(table: JsonValue) -> MPlusConfig:
    """Read the configuration of the memory; where it says nothing of adapters there are the default ones to train."""
    config = MPlusConfig.from_dict(as_table(table, MPlusConfig.__name__))
    # Not the very object: a mechanism that needs no adapters goes without that one (see ``mplus.config.ADAPTERS``).
    return attrs.evolve(config, adapters=AdapterConfig()) if config.adapters is ADAPTERS else config


_OBJECTIVES = _tables(Entry.of)
READERS: dict[str, TableReader] = {
    "model": ModelTable.of,
    "memory": _memory,
    "optimizer": Optimizer.of,
    "checkpoints": _table_of(Checkpoints),
    "metrics": _table_of(Metrics),
    "data": _data,
    "stages": _tables(
        _table_of(
            Stage,
            objectives=_OBJECTIVES,
            revisit=_table_of(Revisit),
            retriever_loss=_table_of(RetrieverLoss),
            until=_table_of(Until),
        )
    ),
    "validation": _table_of(Validation, objectives=_OBJECTIVES),
}
"""Readers of the tables of a recipe."""
