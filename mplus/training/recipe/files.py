"""Recipes as files: by name, with settings changed from outside, and as dry runs."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import define

from mplus.errors import ConfigError, UnknownNameError
from mplus.training.recipe import FOLDER, RECIPES
from mplus.training.recipe.parse import parse_recipe
from mplus.training.recipe.recipe import Recipe
from mplus.training.recipe.tables import error_prefix

DRY_RUN = "dry_run"
"""Table of a recipe that says how to try it at tiny size: ``remove``, a list of settings, and ``set``, a table."""


@define(frozen=True, eq=False)
class RecipeFile:
    """A recipe, and the text it was read from (None where it was given as plain data)."""

    recipe: Recipe
    text: str | None = None


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


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
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    settings: Mapping[str, Any] | None = None,
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
        table = recipe.to_dict()
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
            apply_settings(table, small.get("set", {}), small.get("remove", ()))
    apply_settings(table, settings or {})
    if steps is not None:
        _cap_steps(table, steps)
    return RecipeFile(parse_recipe(table), text)


def apply_settings(table: dict[str, Any], settings: Mapping[str, Any], remove: Iterable[str] = ()) -> None:
    """Remove settings of a recipe's table, then set others, in place. Raises ConfigError when a path leads nowhere."""
    for path in remove:
        for holder, key in _targets(table, path, path.split(".")):
            if isinstance(holder, dict) and key not in holder:
                raise ConfigError(f"{path!r} must be a setting of the recipe to be removed")
            del holder[key]
    for path, value in settings.items():
        for holder, key in _targets(table, path, path.split(".")):
            holder[key] = copy.deepcopy(value)


def _targets(holder: Any, path: str, keys: list[str]) -> list[tuple[Any, Any]]:
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


def _cap_steps(table: dict[str, Any], steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be a whole number of at least 1, got {steps!r}")
    for stage in table.get("stages", ()):
        if isinstance(stage, dict) and isinstance(stage.get("steps"), int):
            stage["steps"] = min(stage["steps"], steps)
            if isinstance(stage.get("until"), dict):
                stage["until"]["window"] = min(stage["until"].get("window", 20), stage["steps"])


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """Return the differences of two recipes' plain data: ``"optimizer.learning_rate: 0.1 then, 0.2 now"``."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = sorted(then.keys() | now.keys())
        pairs = [(f"{where}.{key}" if where else str(key), then.get(key), now.get(key)) for key in keys]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = [(f"{where}.{place}", *pair) for place, pair in enumerate(zip(then, now, strict=True))]
    else:
        return [] if then == now else [f"{where}: {then!r} then, {now!r} now"]
    return [found for name, one, other in pairs for found in differences(one, other, name)]
