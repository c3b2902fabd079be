"""What rows in int8 and fp8 cost: answers, retrieved rows and logits beside those of the same memory unquantised.

    python -m benchmarks.quality.quantized                # writes records/quantized.json

recall-tiny in bfloat16 is told facts; every memory is written twice, with the same draws, once into "ram" and once into
"quantized". It retrieves fewer rows than it was trained with, so that there is something to lose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch import Tensor

import mplus
from benchmarks.records import record_path, write
from mplus.environment import run_info
from mplus.evaluation.reports.cell import wilson
from mplus.facts.episodes import Episode, draw_facts, make_episode
from mplus.facts.language import Language
from mplus.hf.pretrained.config import read_config
from mplus.hf.pretrained.load import without_bars
from mplus.hf.pretrained.shipped import RECALL_TINY
from mplus.memory import Memory

RECORD = record_path("quality", "quantized")
RETRIEVED = 1
FORMATS = ("int8", "fp8")


@define(frozen=True, eq=False)
class Answers:
    """The answers of one memory to every question.

    Attributes:
        right: ``[n]`` bool.
        logits: ``[n, V]`` float32 of the value's token.
        rows: of every question, the retrieved rows as (layer, source, age).
    """

    right: Tensor
    logits: Tensor
    rows: list[set[tuple[int, str | None, int]]]


def ask(model: Any, memory: Memory, language: Language, episode: Episode) -> Answers:
    """Ask for all facts of an episode."""
    questions = [[language.ids[word] for word in language.question(fact)] for fact in episode.facts]
    pairs = zip(episode.facts, episode.values, strict=True)
    values = torch.tensor([language.ids[language.value(fact, value)[0]] for fact, value in pairs])
    said = model.generate(
        input_ids=torch.tensor(questions),
        attention_mask=torch.ones(len(questions), 4, dtype=torch.int64),
        memory=memory.select([0] * len(questions)),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_sources=True,
        output_logits=True,
    )
    rows = [{(row.layer, row.source, row.age) for layer in layers for row in layer} for layers in said.memory_sources]
    logits = said.logits[0].float()
    return Answers(logits.argmax(1) == values, logits, rows)


def compared(plain: Sequence[Answers], other: Sequence[Answers]) -> dict[str, Any]:
    """Compare answers question by question, and say how far rows and logits lie apart."""
    right, changed = (torch.cat([part.right for part in parts]) for parts in (plain, other))
    logits, moved = (torch.cat([part.logits for part in parts]) for parts in (plain, other))
    pairs = [pair for one, two in zip(plain, other, strict=True) for pair in zip(one.rows, two.rows, strict=True)]
    error = (logits - moved).square().mean().sqrt() / logits.std()
    lost, won, count = int((right & ~changed).sum()), int((changed & ~right).sum()), len(right)
    return {
        "questions": count,
        "accuracy_bfloat16": float(right.float().mean()),
        "accuracy": float(changed.float().mean()),
        "difference_points": round(100 * (won - lost) / count, 3),
        "lost": lost,
        "won": won,
        "accuracy_interval": [round(bound, 4) for bound in wilson(int(changed.sum()), count)],
        "retrieved_rows_in_common": sum(len(one & two) / len(one) for one, two in pairs) / len(pairs),
        "logit_error_over_std": round(float(error), 5),
    }


@torch.no_grad()
def measure(memories: int, facts: int, retrieved: int) -> dict[str, Any]:
    """Write every memory into every store, and ask."""
    settings = read_config(RECALL_TINY)
    settings.mplus.update(retrieved_tokens=retrieved, long_term_tokens=None)
    with without_bars():
        model = mplus.from_pretrained(RECALL_TINY, config=settings, dtype=torch.bfloat16, local_files_only=True).eval()
    language, config = Language(), model.mplus_config
    stores: dict[str, Any] = {"ram": "ram", **{form: {"name": "quantized", "format": form} for form in FORMATS}}
    answers: dict[str, list[Answers]] = {name: [] for name in stores}
    for seed in range(memories):
        generator = torch.Generator().manual_seed(seed)
        told = draw_facts(language, facts, True, 0.25, generator)
        tail = config.memory_tokens_per_chunk
        episode = make_episode(language, told, chunk_tokens=config.chunk_tokens, tail=tail, generator=generator)
        made = {name: model.new_memory(store=store, seed=seed) for name, store in stores.items()}
        for number, chunk in enumerate(episode.chunks):
            mplus.write_together(list(made.values()), [chunk] * len(made), [f"fact {number}"] * len(made))
        for name, memory in made.items():
            answers[name].append(ask(model, memory, language, episode))
        sys.stderr.write(f"memory {seed + 1} of {memories}\n")
    row_bytes = {name: memory.stores[0].nbytes / memory.stores[0].count(0) for name, memory in made.items()}
    return {
        "memories": memories,
        "facts_each": facts,
        "retrieved_tokens": retrieved,
        "trained_with": read_config(RECALL_TINY).mplus["retrieved_tokens"],
        "long_term_rows": made["ram"].stores[0].count(0),
        "reserved_bytes_per_row": {name: round(size, 1) for name, size in row_bytes.items()},
        "formats": {form: compared(answers["ram"], answers[form]) for form in FORMATS},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", type=int, default=8)
    parser.add_argument("--facts", type=int, default=512)
    parser.add_argument("--retrieved-tokens", type=int, default=RETRIEVED)
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    found = measure(given.memories, given.facts, given.retrieved_tokens)
    record = {**found, "circumstances": run_info()}
    write(given.record, record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
