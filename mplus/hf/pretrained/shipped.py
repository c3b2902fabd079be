"""The trained decoders and the novel that come with the package.

"stories260K" is a Llama of 260,032 parameters that tells children's stories and knows no memory. "recall-tiny" was
trained with its memory to answer questions in the little language of ``mplus.facts``.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mplus.hf.pretrained.load import from_pretrained, without_bars

if TYPE_CHECKING:
    from mplus.hf.model.model_class import MemoryModel

DATA = Path(__file__).parents[2] / "data"

STORIES260K = DATA / "stories260K"
"""Folder of the decoder and its tokenizer, with licence and provenance; trained with 512 positions."""

RECALL_TINY = DATA / "recall-tiny"
"""Folder of the trained decoder with memory (``save_pretrained``) and its tokenizer."""

TITLE = "The Secret Garden"
AUTHOR = "Frances Hodgson Burnett, 1911"
NOVEL = DATA / "novels" / "Burnett_Garden_1911.txt.gz"
"""The novel, compressed text."""

_HEADING = re.compile(r"^CHAPTER [IVXLC]+\n+(.+)\n", re.MULTILINE)


def load_recall() -> tuple[MemoryModel, PreTrainedTokenizerBase]:
    """Load a new copy of "recall-tiny" with its memory, on the CPU and in eval mode, and its tokenizer."""
    with without_bars():
        model = from_pretrained(RECALL_TINY, local_files_only=True).eval()
        return model, AutoTokenizer.from_pretrained(RECALL_TINY, local_files_only=True)


def load_decoder() -> Any:  # transformers types ``to`` so that no dtype is taken
    """Load a new copy of "stories260K", without memory, on the CPU and in eval mode."""
    with without_bars():
        return AutoModelForCausalLM.from_pretrained(STORIES260K, local_files_only=True).eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the tokenizer of "stories260K"."""
    return AutoTokenizer.from_pretrained(STORIES260K, local_files_only=True)


@define(frozen=True)
class Chapter:
    """One chapter of the novel.

    Attributes:
        name: number and title, for example ``chapter 7: THE KEY TO THE GARDEN``.
        text: the whole chapter, heading included.
    """

    name: str
    text: str


def chapters(file: Path = NOVEL) -> list[Chapter]:
    """Return the chapters of the novel in order; together they are all of it but the title page."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        text = opened.read()
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return [
        Chapter(f"chapter {number}: {heading[1].strip()}", text[heading.start() : end])
        for number, (heading, end) in enumerate(zip(headings, ends, strict=True), 1)
    ]
