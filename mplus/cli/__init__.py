"""The command line. What a command needs beyond its own name is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

import mplus
from mplus.cli.demo import demo, demo_continue
from mplus.cli.errors import ErrorLineGroup
from mplus.cli.import_ import import_checkpoint
from mplus.cli.info import info
from mplus.cli.memory import show, verify
from mplus.cli.plugins import plugins
from mplus.cli.replay import replay

__all__ = ["app", "main"]


def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version of mplus and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="With an error, also print where it was raised.")] = False,
) -> None:
    """Long-term memory for Hugging Face decoders."""
    if version:
        print(mplus.__version__)
        raise typer.Exit


def _app() -> typer.Typer:
    options = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
    commands = typer.Typer(cls=ErrorLineGroup, context_settings={"help_option_names": ["-h", "--help"]}, **options)
    commands.callback()(_options)
    commands.command()(demo)
    commands.command(hidden=True)(demo_continue)
    commands.command()(info)
    commands.command()(plugins)
    commands.command()(replay)
    commands.command("import")(import_checkpoint)
    memory = typer.Typer(no_args_is_help=True, help="Look at saved memories.")
    memory.command()(show)
    memory.command()(verify)
    commands.add_typer(memory, name="memory")
    return commands


app = _app()


def main() -> None:
    """Run ``mplus`` with the arguments of the process."""
    app(prog_name="mplus")
