"""What a recipe names, built: tokenizer, decoder, sources of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mplus.hf.decoders.tokenizers import train_tokenizer
from mplus.hf.decoders.train_model import TrainTokenizer, build_for_training, load_for_training, load_tokenizer
from mplus.hf.model.installed import WrappedModel
from mplus.training.batch import BatchSource
from mplus.training.data import SOURCES
from mplus.training.data.counter_rng import CounterRNG, Key
from mplus.training.data.documents import open_documents
from mplus.training.parallel import barrier, rank
from mplus.training.recipe.checks import check_chunks
from mplus.training.recipe.recipe import Recipe
from mplus.training.recipe.tables import DataSet, NewTokenizer

RECALL = "recall"
"""Name of the little language's tokenizer."""


def derive_seed(*key: Key) -> int:
    """Return a seed for the purpose that ``key`` names."""
    return CounterRNG(*key).below(1 << 31)


def make_tokenizer(recipe: Recipe, folder: Path | None) -> TrainTokenizer | None:
    """Return the tokenizer of a recipe, or None; a new one is kept in ``folder``, and taken from there later."""
    wanted = recipe.model.tokenizer
    if isinstance(wanted, NewTokenizer):
        if folder is None:
            return train_tokenizer(_texts(recipe, wanted), wanted.vocabulary)
        if rank() == 0 and not folder.exists():
            train_tokenizer(_texts(recipe, wanted), wanted.vocabulary).save_pretrained(folder)
        barrier()
        return load_tokenizer(str(folder))
    if wanted == RECALL:
        from mplus.facts.episodes import recall_tokenizer

        found: TrainTokenizer = recall_tokenizer()
        return found
    if wanted is None and recipe.model.path is None:
        return None
    return load_tokenizer(wanted or recipe.model.path or "")


def _texts(recipe: Recipe, wanted: NewTokenizer) -> Iterator[str]:
    each = wanted.characters // len(wanted.data)
    for name in wanted.data:
        left = each
        for document in open_documents(recipe.data[name].parsed).iterate():
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break


def make_model(recipe: Recipe, seed: int, tokenizer: TrainTokenizer | None) -> WrappedModel:
    """Build the wrapped decoder, equal in all processes; torch's global generator is seeded.

    Raises ConfigError where the data's chunks are longer than the decoder's.
    """
    torch.manual_seed(derive_seed(seed, "weights"))
    wanted, build = recipe.model, recipe.model.build
    if build is not None:
        model = build_for_training(build.model_type, build.fields, build.init, recipe.memory, tokenizer)
    else:
        model = load_for_training(str(wanted.path), recipe.memory, getattr(torch, wanted.dtype))
    check_chunks(recipe, model.mplus_config.chunk_tokens)
    return model


def make_source(data: DataSet, *, tokenizer: TrainTokenizer | None, numbers: Sequence[int], seed: int) -> BatchSource:
    """Build the source of batches of a data set for the streams of this process."""
    cls: Any = SOURCES.get(data.kind)
    source: BatchSource = cls(data.parsed, tokenizer=tokenizer, numbers=numbers, seed=seed)
    return source
