"""Going on by hand: a person tells facts and asks for them."""

from __future__ import annotations

from collections.abc import Callable

from mplus.cli.demo.chat import Talk
from mplus.errors import InputError

HELP = """
Tell a fact:  colour of ada baker red .
Ask for one:  colour of ada baker
Relations are {relations}; end with an empty line.
"""


def converse(talk: Talk, read: Callable[[str], str] = input, say: Callable[[str], None] = print) -> None:
    """Read lines until an empty one or the end of input; what is wrong is said, and the conversation goes on."""
    say(HELP.format(relations=", ".join(talk.language.relation_names)))
    turns = 0
    while True:
        try:
            line = read("> ").strip(" ?.\t")
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        turns += 1
        try:
            if len(line.split()) <= 4:
                answer = talk.ask(line)
                age = "" if answer.age is None else f", {answer.age} chunks ago"
                say(f"{answer.words}   (known: {answer.known:.2f}; best row: {answer.source or '-'}{age})")
            else:
                talk.tell(line, f"you {turns}")
                say("told.")
        except InputError as error:
            say(str(error))
