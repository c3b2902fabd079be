"""Recipes: all settings of a training as validated classes, read from TOML files that are found by name."""

from pathlib import Path

from mplus.registry import FileRegistry

__all__ = ["FOLDER", "RECIPES"]

FOLDER = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""

RECIPES = FileRegistry(
    "recipe", group="mplus.recipes", builtin={path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
)
"""Recipes by name: a package announces the ``pathlib.Path`` of a TOML file."""
