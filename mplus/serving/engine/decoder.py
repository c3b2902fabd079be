"""ServedDecoder: the decoder of a server with its tokenizer, loaded so that memories survive a restart."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define
from torch import nn

from mplus.errors import CheckpointError
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.model.sizes import known_positions
from mplus.hf.pretrained.chat_model import load_chat_model, with_memory
from mplus.hf.pretrained.load import from_pretrained, without_bars
from mplus.serving.messages import ModelFacts
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mplus.hf.types import PreTrainedModel, PreTrainedTokenizerBase

ADDITIONS = ".model"
"""Folder, beside the tenants', of what ``wrap`` added to a decoder that was not saved with a memory."""


@define(frozen=True, eq=False)
class ServedDecoder:
    """A wrapped decoder in eval mode.

    Attributes:
        model: the decoder.
        tokenizer: of it.
        facts: what the front has to know.
        ends: ids of tokens that end an answer.
    """

    model: MemoryModel
    tokenizer: Tokenizer
    facts: ModelFacts
    ends: frozenset[int]

    @staticmethod
    def of(model: MemoryModel, tokenizer: PreTrainedTokenizerBase, name: str) -> ServedDecoder:
        """Return a decoder that is loaded already, under the name that clients ask for it by."""
        engine = model.mplus_engine
        end = model.generation_config.eos_token_id
        ends = frozenset() if end is None else frozenset(end if isinstance(end, list) else [end])
        facts = ModelFacts(
            name=name,
            folder=str(tokenizer.name_or_path),
            context=_context(model),
            vocabulary=engine.vocab_size,
            mechanism=engine.mechanism.name,
            created=int(time.time()),
        )
        # ``model.eval()``, to which transformers gives no type.
        return ServedDecoder(nn.Module.eval(model), tokenizer, facts, ends)

    @staticmethod
    def load(
        name: str, memories: Path, *, mechanism: str | None = None, served_name: str | None = None
    ) -> ServedDecoder:
        """Load a decoder to serve.

        Args:
            name: "smollm2", a folder, or a name on the Hub; with a memory of its own if it was saved with one.
            memories: the folder of all memories, which keeps what ``wrap`` adds to any other.
            mechanism: of the memory; None: "kv", or the one that is saved.
            served_name: what clients call it; None: ``name``, of a folder the last part.

        Raises:
            CheckpointError: it cannot be loaded, or the memories were made with another mechanism.
            ConfigError, NotSupported: the mechanism does not go with it.
        """
        decoder, tokenizer = load_chat_model(name)
        if hasattr(decoder, "mplus_engine"):
            model = with_memory(decoder, mechanism)
        else:
            model = _wrapped(decoder, memories / ADDITIONS, mechanism)
        return ServedDecoder.of(model, tokenizer, served_name or (Path(name).name if Path(name).exists() else name))


def _wrapped(decoder: PreTrainedModel, kept: Path, mechanism: str | None) -> MemoryModel:
    """Return a decoder with the additions of the first start; the first start makes and keeps them."""
    with without_bars():
        if kept.is_dir():
            model: MemoryModel = from_pretrained(kept, base=decoder)
            saved = model.mplus_engine.mechanism.name
            if mechanism not in (None, saved):
                raise CheckpointError(
                    f"the memories in {kept.parent} were made with the mechanism {saved!r}, got {mechanism!r}: leave "
                    "it out, or give another folder"
                )
            return model
        model = with_memory(decoder, mechanism)
        draft = kept.with_name(f"{ADDITIONS}-draft")
        model.save_pretrained(draft)
        draft.rename(kept)
    return model


def _context(model: MemoryModel) -> int:
    """Return the positions for a prompt and its answer, beside what is read."""
    positions = known_positions(model.config.get_text_config(decoder=True))
    if positions is None:
        return 2**20
    engine, config = model.mplus_engine, model.mplus_config
    rows = (config.retrieved_tokens or 0) + (0 if engine.mechanism.retrieves_in_open else config.short_term_tokens or 0)
    # A memory that takes nearly all positions leaves half of them, so that there is room for a prompt at all.
    return max(positions - int(engine.retrofit.positions.extent(1 + rows)), positions // 2)
