"""Memories of the field that need no training, on a chat model: notes, and paragraphs of SQuAD.

    python -m benchmarks.quality.field_chat --model FOLDER --data FOLDER_OF_SQUAD     # writes records/field-chat.json

``FOLDER`` is a chat model, such as the one that ``mplus get smollm2`` prints. The samples are small; the page says how
many questions there were, and gives intervals. With ``--only`` the other protocol stays in the record as it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.quality import chat
from benchmarks.records import load, record_path, write

MEMORIES: tuple[dict[str, Any], ...] = (
    {"mechanism": "kv"},
    {"mechanism": {"name": "memlong", "group_tokens": 32}, "retrieved_tokens": 128, "adapters": False},
    {"mechanism": {"name": "scm", "turns": 3, "needed": "off", "enough": "off", "summaries": "off", "recency": 0.0}},
    {"mechanism": {"name": "retllm", "reads": "prompt"}},
    {"mechanism": {"name": "memllm", "reads": "prompt"}},
)
"""With settings that do not rely on decisions or calls that an untrained model cannot make."""
ARMS = "none,ceiling,kv,memlong,scm,retllm,memllm"
SIZES = {
    "notes": ["notes=24", "questions=24", "episodes=1"],
    "squad": ["passages=3", "episodes=16"],
}


def main() -> None:
    """Measure, and write the record anew after each protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(SIZES), default=list(SIZES))
    asked = parser.parse_args()
    path = record_path("quality", "field-chat")
    found: dict[str, Any] = load("quality", "field-chat") if path.exists() else {}
    for protocol in asked.only:
        given = argparse.Namespace(
            protocol=protocol,
            model=asked.model,
            data=asked.data if protocol == "squad" else None,
            memory=[json.dumps(one) for one in MEMORIES],
            arms=ARMS,
            search=False,
            size="small",
            set=SIZES[protocol],
            timed=0,
            seed=0,
            threads=1,
        )
        found[protocol] = chat.measure(given)
        write(path, {name: found[name] for name in SIZES if name in found})


if __name__ == "__main__":
    main()
