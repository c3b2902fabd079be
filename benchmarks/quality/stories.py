"""How much of the context that a sliding window loses a memory wins back, in children's stories.

    mplus train stories --set 'data.*.paths=["FOLDER/train.jsonl"]'
    python -m benchmarks.quality.stories runs/stories/model FOLDER/valid.txt   # writes records/stories.json

The text is cut into pieces of 8 chunks of context and 32 tokens that follow; all ways predict the same last 24 of
these. The same checkpoint is read with the memory of its own context and with a full one of other pieces.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import mplus
from benchmarks.records import record_path, write
from mplus.environment import run_info
from mplus.evaluation.context import context_value
from mplus.hf.pretrained.shipped import load_tokenizer

RECORD = record_path("quality", "stories")
CHUNK, CHUNKS, TEXT, KNOWN = 32, 8, 32, 8


def pieces(text: str, tokenizer: Any) -> list[torch.Tensor]:
    """Cut the text into pieces of equal length, one behind the other."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return [piece for piece in ids.split(CHUNK * CHUNKS + TEXT) if len(piece) == CHUNK * CHUNKS + TEXT]


def measure(model: Any, texts: list[torch.Tensor]) -> dict[str, Any]:
    """Measure with the story in short-term memory, and after so much more that most of it is in long-term memory."""
    sizes = {"chunk_tokens": CHUNK, "chunks": CHUNKS, "text_tokens": TEXT, "known_tokens": KNOWN}
    return {
        "at_once": context_value(model, texts, **sizes).plain(),
        "after_16_other_chunks": context_value(model, texts, **sizes, distraction=16).plain(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--pieces", type=int, default=512, help="most pieces")
    parser.add_argument("--skip", type=int, default=0, help="pieces at the beginning that are left out")
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    texts = pieces(given.text.read_text(encoding="utf-8"), load_tokenizer())[given.skip :][: given.pieces]
    found = measure(mplus.from_pretrained(given.model).eval(), texts)
    record = {
        "recipe": "stories",
        "data": given.text.name,
        "skipped_pieces": given.skip,
        **found,
        "circumstances": run_info(),
    }
    write(given.record, record)
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
