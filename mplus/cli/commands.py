"""The commands, put together, and how errors end them: one line instead of a traceback."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mplus
from mplus.cli import bench as benching
from mplus.cli.chat.command import chat
from mplus.cli.demo.command import demo, demo_continue, demo_novel, demo_reopen
from mplus.cli.eval_chat import TOLD, chat_command
from mplus.cli.evaluation import abstention, harm, retention, retriever
from mplus.cli.get import get
from mplus.cli.import_ import import_checkpoint
from mplus.cli.info import info
from mplus.cli.memory import expire, forget, pin, repair, rewrite, show, sources, text, unpin, verify
from mplus.cli.plugins import plugins
from mplus.cli.replay import replay
from mplus.cli.serving import keys as serving_keys
from mplus.cli.serving.serve import serve
from mplus.cli.training.train import train
from mplus.cli.training.train_retriever import train_retriever
from mplus.errors import MPlusError

EXIT_CODE = 2


class ErrorLineGroup(TyperGroup):
    """Commands of which an ``MPlusError`` becomes one line on stderr; ``--debug`` puts the traceback before it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MPlusError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            print(f"mplus: {error}".replace("\n", " "), file=sys.stderr)
            raise typer.Exit(EXIT_CODE) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        print(mplus.__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version of mplus.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="With an error, also print where it was raised.")] = False,
) -> None:
    """Long-term memory for Hugging Face decoders."""


def _app() -> typer.Typer:
    commands = typer.Typer(
        cls=ErrorLineGroup,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    commands.callback()(_options)
    commands.command()(chat)
    commands.command()(demo)
    commands.command()(demo_novel)
    commands.command(hidden=True)(demo_continue)
    commands.command(hidden=True)(demo_reopen)
    commands.command()(get)
    commands.command()(info)
    commands.command()(plugins)
    commands.command()(replay)
    commands.command()(serve)
    commands.command()(train)
    commands.command()(train_retriever)
    commands.command("import")(import_checkpoint)
    memory = typer.Typer(no_args_is_help=True, help="Look at memories on disk, and at single sources of them.")
    memory.command()(show)
    memory.command()(sources)
    memory.command()(forget)
    memory.command()(expire)
    memory.command()(pin)
    memory.command()(unpin)
    memory.command()(text)
    memory.command()(rewrite)
    memory.command()(verify)
    memory.command()(repair)
    commands.add_typer(memory, name="memory")
    keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys of a server, also while it runs.")
    keys.command()(serving_keys.make)
    keys.command("list")(serving_keys.list_)
    keys.command()(serving_keys.revoke)
    commands.add_typer(keys, name="keys")
    evaluation = typer.Typer(no_args_is_help=True, help="Measure a memory, its baselines and what it costs.")
    evaluation.command()(retention)
    evaluation.command()(harm)
    evaluation.command()(retriever)
    evaluation.command()(abstention)
    for name in TOLD:
        evaluation.command(name)(chat_command(name))
    commands.add_typer(evaluation, name="eval")
    bench = typer.Typer(no_args_is_help=True, help="Measure speed, side by side with plain ways to do the same.")
    for command in (benching.read, benching.write, benching.decode, benching.score, benching.attention, benching.store):
        bench.command()(command)
    commands.add_typer(bench, name="bench")
    return commands


app = _app()
