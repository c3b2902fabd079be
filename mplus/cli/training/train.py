"""``mplus train``: train a decoder to use its memory."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplus.cli.output import print_json
from mplus.config import JsonValue
from mplus.errors import ConfigError

if TYPE_CHECKING:
    from mplus.training import TrainingResult

RUNS = Path("runs")


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file, or the name of a recipe of mplus or of another package; none: that of --resume.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; default: runs/ and the recipe's name.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder, from its newest checkpoint.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Change a setting, as in optimizer.learning_rate=1e-4 or stages.*.steps=10. VALUE is TOML; what is "
            "not is taken as text. May be given several times.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The most steps of each stage.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Try the recipe at the tiny size it gives.")] = False,
    names: Annotated[
        bool, typer.Option("--list", help="List the names of recipes, those of other packages too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came of it as JSON.")] = False,
) -> None:
    """Train a decoder to use its memory.

    For several processes: accelerate launch -m mplus.cli train RECIPE, with DDP or FSDP2.
    """
    from mplus.training.recipe import RECIPES

    if names:
        print_json(RECIPES.names()) if as_json else print("\n".join(RECIPES.names()))
        return
    from torch import distributed

    from mplus.training import train as run
    from mplus.training.parallel import rank

    result = run(
        recipe,
        out=_folder(recipe, settings) if out is None and resume is None else out,
        resume=resume,
        seed=seed,
        settings=parse(settings or []),
        steps=steps,
        dry_run=dry_run,
        progress=False if as_json else None,
    )
    if rank() == 0:
        print_json(result.to_dict()) if as_json else _show(result)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _folder(recipe: str | None, settings: list[str] | None) -> Path:
    """Return ``runs/NAME``, NAME as in ``--set``, else the name of the file or the recipe."""
    from mplus.training.recipe.files import find_recipe

    if recipe is None:
        raise ConfigError("a recipe must be given, or a run to resume, got neither: mplus train --list shows recipes")

    path = find_recipe(recipe)
    return RUNS / str(parse(settings or []).get("name", path.stem if Path(recipe).is_file() else recipe))


def parse(settings: list[str]) -> dict[str, JsonValue]:
    """Parse ``["a.b=1"]`` to ``{"a.b": 1}``. Raises ConfigError for what has no path or no value."""
    found: dict[str, JsonValue] = {}
    for setting in settings:
        path, sign, value = setting.partition("=")
        if not path.strip() or not sign:
            raise ConfigError(f"--set must be PATH=VALUE, got {setting!r}")
        try:
            found[path.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[path.strip()] = value  # the rule of this option, so that text needs no quotes within quotes
    return found


def _show(result: TrainingResult) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for missed in result.missed:
        console.print(f"restarted: {missed}")
    for stage in result.stages:
        goal = f", {stage['metric']} {stage['value']:.3f}" if "metric" in stage else ""
        short = " (goal missed)" if stage.get("reached") is False else ""
        console.print(f"stage {stage['name']}: {stage['steps']} steps{goal}{short}")
        for name, counts in stage.get("skipped", {}).items():
            passed = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items())
            console.print(f"  data {name}, skipped: {passed}")
    console.print(
        f"{result.steps} steps in {result.seconds:.0f} s, seed {result.seeds[-1]}, restarts: {result.restarts}"
    )
    for name, value in sorted(result.metrics.items()):
        if "/" in name or name == "total_loss":
            console.print(f"  {name:<40} {value:.4f}")
    if result.folder is not None:
        console.print(f"wrote {result.folder} (the decoder with its memory is in {result.folder / 'model'})")
