"""The command line. What a command needs beyond its own name is imported when it runs."""

from mplus.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """Run ``mplus`` with the arguments of the process."""
    app(prog_name="mplus")
