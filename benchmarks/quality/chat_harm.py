"""What an unrelated memory does to a chat model's reading of other text: writes records/chat-harm.json.

    python -m benchmarks.quality.chat_harm --model FOLDER --text TEXT --unrelated NOVEL

Perplexity of pieces of TEXT without memory, and with one full of NOVEL: with the threshold below which nothing is
brought back, and with none, so that every piece reads a chunk that has nothing to do with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import record_path, write
from mplus.config import JsonValue
from mplus.environment import load_average
from mplus.evaluation.chat.memories import memory_configs, wrapped_each
from mplus.evaluation.harm import HarmOptions, harm
from mplus.evaluation.texts import read
from mplus.hf.pretrained.load import load_decoder_with_tokenizer

MEMORIES = {
    "with the threshold": "kv",
    "without": '{"mechanism": {"name": "kv", "min_score": 0}}',
}
"""Row of the record -> memory, as for ``mplus eval``."""


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the report of ``harm`` with and without the threshold, and the load of the machine."""
    torch.set_num_threads(1)
    before = load_average()
    decoder, tokenizer = load_decoder_with_tokenizer(given.model)
    words: Any = tokenizer
    options = HarmOptions(
        text_tokens=given.text_tokens,
        pieces=given.pieces,
        unrelated_tokens=given.unrelated_tokens,
        bos=words.bos_token_id,
    )
    found: dict[str, JsonValue] = {}
    for name, label in MEMORIES.items():
        for _, model in wrapped_each(decoder, memory_configs([label])):
            texts = read(given.text), read(given.unrelated)
            found[name] = harm(model, words, *texts, options=options, name=Path(given.model).name, progress=False)
    texts_read = {"text": given.text.name, "unrelated": given.unrelated.name}
    return {"load_average": [before, load_average()], **texts_read, "memories": found}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--unrelated", type=Path, required=True, help="text to remember")
    parser.add_argument("--pieces", type=int, default=64)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--unrelated-tokens", type=int, default=20_000)
    parser.add_argument("--record", type=Path, default=record_path("quality", "chat-harm"))
    given = parser.parse_args()
    write(given.record, measure(given))


if __name__ == "__main__":
    main()
