"""How errors end a command: one line instead of a traceback."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

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
