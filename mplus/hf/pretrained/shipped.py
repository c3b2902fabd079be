"""The trained decoders that come with the package.

"stories260K" is a Llama of 260,032 parameters that tells children's stories and knows no memory. "recall-tiny" was
trained with its memory to answer questions in the little language of ``mplus.facts``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mplus.hf.pretrained.load import from_pretrained, without_bars

STORIES260K = Path(__file__).parents[2] / "data" / "stories260K"
"""Folder of the decoder and its tokenizer, with licence and provenance; trained with 512 positions."""

RECALL_TINY = STORIES260K.parent / "recall-tiny"
"""Folder of the trained decoder with memory (``save_pretrained``) and its tokenizer."""


def load_recall() -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a new copy of "recall-tiny" with its memory, on the CPU and in eval mode, and its tokenizer."""
    with without_bars():
        model = from_pretrained(RECALL_TINY, local_files_only=True).eval()
        return model, AutoTokenizer.from_pretrained(RECALL_TINY, local_files_only=True)


def load_decoder() -> Any:
    """Load a new copy of the decoder, on the CPU and in eval mode. Needs no network."""
    with without_bars():
        return AutoModelForCausalLM.from_pretrained(STORIES260K, local_files_only=True).eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the tokenizer of that decoder."""
    return AutoTokenizer.from_pretrained(STORIES260K, local_files_only=True)
