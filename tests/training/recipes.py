"""A recipe for a tiny decoder, to be varied by tests."""

from __future__ import annotations

import copy
from typing import Any

from mplus.training.recipe import FOLDER
from mplus.training.recipe.files import apply_settings

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.toml"))
"""Names of the recipes that come with the package."""

FACTS = {"kind": "recall", "language": {"relations": 2, "firsts": 8, "lasts": 8}, "chunk_tokens": 12}

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "streams": 2,
    "model": {
        "tokenizer": "recall",
        "build": {
            "model_type": "llama",
            "init": "mimetic",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
    },
    "memory": {
        "chunk_tokens": 12,
        "min_chunk_tokens": 4,
        "memory_tokens_per_chunk": 3,
        "short_term_tokens": 7,
        "retrieved_tokens": 4,
        "long_term_tokens": 12,
        "retriever": {"name": "linear", "width": 8},
        "adapters": {"rank": 2},
    },
    "optimizer": {"parameters": "all", "learning_rate": 3e-3, "warmup_steps": 2, "clip": 1.0},
    "metrics": {"every_steps": 2},
    "checkpoints": {"every_steps": 4},
    "data": {
        "one": {**FACTS, "episode": 2, "questions": 2, "ages": "all", "window_tokens": 12},
        "many": {**FACTS, "episode": 9, "questions": 3, "ages": "mixed"},
    },
    "stages": [
        {
            "name": "first",
            "steps": 4,
            "objectives": [
                {"name": "single_context", "data": "one", "chunks": 2},
                {"name": "window", "beside": 0.5},
            ],
        },
        {
            "name": "second",
            "steps": 8,
            "long_term": True,
            "retriever_loss": {"candidates": 6},
            "revisit": {"probability": 0.4, "renew": 0.5},
            "objectives": [
                {"name": "single_context", "data": "many", "probability": 0.6},
                {"name": "multi_chunk", "data": "many", "probability": 0.4, "chunks": 2},
            ],
        },
    ],
}


def recipe(remove: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    """The recipe with changes; dots in paths are written ``__``: ``stages__0__steps=2``."""
    table = copy.deepcopy(RECIPE)
    apply_settings(table, {path.replace("__", "."): value for path, value in settings.items()}, remove)
    return table
