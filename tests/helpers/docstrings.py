"""The examples in docstrings, run as doctest runs them."""

from __future__ import annotations

import doctest
from typing import Any

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_examples(thing: Any, **names: Any) -> None:
    """Run the examples in the docstring of a class or function, which can use ``names``; each must say what it does."""
    parsed = doctest.DocTestParser().get_doctest(thing.__doc__, dict(names), thing.__qualname__, None, None)
    assert parsed.examples, f"{thing.__qualname__} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(parsed, out=said.append)
    assert not result.failed, "".join(said)
