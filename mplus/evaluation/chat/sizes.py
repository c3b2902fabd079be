"""Sizes of the protocols for chat models: a small one that is over soon, and the ones that results are asked for at."""

from __future__ import annotations

from collections.abc import Mapping

from mplus.config import JsonValue
from mplus.evaluation.tasks.base import Protocol

Options = Mapping[str, JsonValue]

PLAIN = "{question} Answer in a few words."
"""How a chat model is asked what public data sets ask; their own prompts are for decoders that go on with a text."""

ANSWER_TOKENS = 24
"""Of an answer to what public data sets ask: a chat model says a sentence, of which the answer may be the end."""


def answer_tokens(task: Protocol) -> int:
    """Return the most tokens that a chat model is given for an answer: ``ANSWER_TOKENS``, or what the protocol says.

    Protocols made for chat models say how many; the number that the others have is of decoders that go on with a text.
    """
    own = task.answer_tokens
    return ANSWER_TOKENS if own == Protocol.answer_tokens else own


SIZES: Mapping[str, Mapping[str, Options]] = {
    "notes": {
        "small": {"notes": 12, "questions": 8, "episodes": 1},
        "asked": {"notes": 48, "questions": 48, "episodes": 5},
        "changing": {"notes": 48, "questions": 32, "changed": 0.5, "episodes": 5},
        "among": {"notes": 1000, "questions": 60, "among": 100_000, "episodes": 1},
    },
    "needles": {
        "small": {"lengths": [500, 1000], "depths": [0, 0.5, 1], "episodes": 1},
        "asked": {"lengths": [10_000, 50_000, 200_000], "depths": [0, 0.25, 0.5, 0.75, 1], "episodes": 5},
        "together": {
            "lengths": [10_000, 50_000, 100_000, 200_000],
            "depths": [0, 0.25, 0.5, 0.75, 1],
            "episodes": 5,
            "together": True,
        },
    },
    "conversations": {
        "small": {"sessions": 2, "turns": 8, "episodes": 1, "questions": 40, "categories": [1, 2, 4, 5]},
        "asked": {"episodes": 10, "questions": 200, "categories": [1, 2, 3, 4, 5]},
    },
    "squad": {
        "small": {"passages": 3, "episodes": 4, "passage_tokens": 200, "prompt": PLAIN},
        "asked": {"passages": 101, "episodes": 100, "passage_tokens": 512, "prompt": PLAIN},
        "together": {
            "contexts": 100,
            "questions": 100,
            "passages": 101,
            "episodes": 1,
            "passage_tokens": 200,
            "answer_tokens": 16,
            "golds": "all",
            "prompt": PLAIN,
        },
        "search": {
            "contexts": 500,
            "questions": 200,
            "passages": 1,
            "episodes": 1,
            "passage_tokens": 512,
            "answer_tokens": 16,
            "golds": "all",
            "prompt": PLAIN,
        },
    },
    "natural-questions": {
        "small": {"passages": 3, "episodes": 4, "passage_tokens": 256, "prompt": PLAIN},
        "asked": {"passages": 101, "episodes": 100, "passage_tokens": 512, "prompt": PLAIN},
    },
    "babi": {
        "small": {"passages": 3, "episodes": 4, "passage_tokens": 256, "prompt": PLAIN},
        "asked": {"passages": 33, "episodes": 100, "passage_tokens": 256, "prompt": PLAIN},
    },
}
"""Protocol -> size -> options."""
