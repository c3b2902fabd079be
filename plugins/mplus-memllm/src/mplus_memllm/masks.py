"""The tokens of an example that are trained, as the paper has it: calls and the text behind them, but not results."""

from __future__ import annotations

from collections.abc import Sequence

from mplus_memllm.calls import ARROW, CLOSES, OPENS

CALLS_OF_A_SENTENCE = 2
"""Marks that open something in the prompt of a write."""


def trained_in_write(tokens: Sequence[str]) -> list[bool]:
    """Return which tokens of a write example are trained: all from the third opening mark on.

    Args:
        tokens: of prompt and call; each mark is a token.
    """
    opened, found = 0, []
    for token in tokens:
        opened += token == OPENS
        found.append(opened > CALLS_OF_A_SENTENCE)
    return found


def trained_in_read(tokens: Sequence[str]) -> list[bool]:
    """Return which tokens of a read example are trained: all from the first call on, but for results and their end.

    The released script trains the results of a document's first call, and masks all later calls.

    Args:
        tokens: of the text with calls; each mark is a token.
    """
    begun, result, found = False, False, []
    for token in tokens:
        begun = begun or token == OPENS
        found.append(begun and not result)
        if token == ARROW:
            result = True
        elif token == CLOSES:
            result = False
    return found
