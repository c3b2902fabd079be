"""Recipes: all settings of a training as validated classes, read from TOML."""
