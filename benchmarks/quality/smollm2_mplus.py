"""What the M+ memory that the recipe ``smollm2`` trains answers about facts of names and sentences never trained.

    mplus get smollm2-mplus
    python -m benchmarks.quality.smollm2_mplus FOLDER NOVELS    # writes records/smollm2-mplus.json

Facts about invented people are told in running text of NOVELS, one a chunk; every memory is told as many chunks as its
short-term memory holds and is then asked about all of them. Names, values, sentences and questions are the held-out
ones of ``mplus.facts.notes``. An answer is right where each of its tokens is the most probable one, as generating
greedily would have it. And what a memory full of unrelated text costs on text it has nothing to do with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import record_path, write
from mplus.environment import run_info
from mplus.evaluation.harm import HarmOptions, harm
from mplus.evaluation.tasks.novels import novel_paragraphs
from mplus.hf.pretrained.load import load_with_tokenizer
from mplus.training.batch import Batch
from mplus.training.data.documents import DocumentOptions
from mplus.training.data.generated.notes import NoteBatches, NoteOptions
from mplus.training.decoder import make_streams, set_sizes

RECORD = record_path("quality", "smollm2-mplus")
CHUNK, CHUNKS = 32, 4
"""Tokens of a chunk, and chunks of a short-term memory."""
STREAMS, QUESTIONS = 8, 4
SEED = 20_261_130
"""Of facts; not one of a training."""
SIZES = {
    "a row for every token": {"memory_tokens_per_chunk": CHUNK, "short_term_tokens": CHUNKS * CHUNK},
    "a row for every second token": {"memory_tokens_per_chunk": CHUNK // 2, "short_term_tokens": CHUNKS * CHUNK // 2},
}


def notes(tokenizer: Any, novels: Sequence[Path], chat: bool) -> NoteBatches:
    """Return facts of the held-out half, as many told between two batches as a short-term memory holds."""
    options = NoteOptions(
        filler=DocumentOptions(paths=tuple(map(str, novels))),
        chunk_tokens=(CHUNK, CHUNK),
        questions=QUESTIONS,
        uniform=1.0,
        max_age=CHUNKS - 1,
        held_out=True,
        chat=float(chat),
    )
    return NoteBatches(options, tokenizer=tokenizer, numbers=range(STREAMS), seed=SEED)


def right(logits: Tensor, texts: Tensor, answers: Tensor) -> Tensor:
    """Return ``[...]`` bool: whether every token of an answer is the most probable one.

    Args:
        logits: ``[..., T, V]``.
        texts: ``[..., T]`` int64.
        answers: ``[..., T]`` bool.
    """
    hit = logits[..., :-1, :].argmax(-1) == texts[..., 1:]
    return (hit | ~answers[..., 1:]).all(-1)


@torch.no_grad()
def by_memory(model: Any, source: NoteBatches, rounds: int) -> dict[str, Any]:
    """Return the share of right answers by age in chunks, and their number."""
    found: dict[int, list[bool]] = defaultdict(list)
    streams = make_streams(model.mplus_engine, range(STREAMS), seed=SEED, long_term=False)
    for _ in range(rounds):
        batch = source.next_batch(CHUNKS)
        for place in range(CHUNKS):
            streams.write(batch.chunks[:, place], batch.sources[:, place])
        hits = right(streams.read(batch.texts).logits, batch.texts, answers_of(batch))
        ages = batch.sources[:, -1:] - batch.text_sources
        for age, hit in zip(ages.flatten().tolist(), hits.flatten().tolist(), strict=True):
            found[age].append(hit)
    return summary(found)


def answers_of(batch: Batch) -> Tensor:
    """Return the mask of the answers, which notes always have."""
    if batch.answer_mask is None:
        raise ValueError("notes must say which tokens are the answer")
    return batch.answer_mask


def summary(found: dict[int, list[bool]]) -> dict[str, Any]:
    """Return the share of right answers, by age and altogether, and the number of questions."""
    every = [hit for hits in found.values() for hit in hits]
    ages = {str(age): round(sum(found[age]) / len(found[age]), 4) for age in sorted(found)}
    return {"right": round(sum(every) / len(every), 4), "questions": len(every), "right_by_age_in_chunks": ages}


def measure(model: Any, tokenizer: Any, novels: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Return everything that is recorded."""
    own, found = model.mplus_config, dict[str, Any]()
    for name, sizes in SIZES.items():
        set_sizes(model.mplus_engine, own, sizes)
        for form, chat in (("plain", False), ("chat", True)):
            asked = by_memory(model, notes(tokenizer, novels, chat), rounds if not chat else max(rounds // 2, 1))
            found.setdefault(name, {})[form] = asked
            sys.stderr.write(f"{name}, {form}: {asked}\n")
    set_sizes(model.mplus_engine, own, {})
    begin = tokenizer.bos_token_id
    books = ["\n\n".join(novel_paragraphs(novel, "all")[0]) for novel in (novels[0], novels[-1])]
    held_out, unrelated = (
        book[len(book) // 3 :][:characters] for book, characters in zip(books, (20_000, 4_000), strict=True)
    )
    options = HarmOptions(text_tokens=128, pieces=32, unrelated_tokens=8 * CHUNK, bos=begin, bos_with_memory=False)
    cost = harm(model, tokenizer, held_out, unrelated, options=options, progress=False)
    names = ("nats_per_token", "perplexity", "change_percent", "predicted_tokens", "memory_rows_by_layer")
    return {
        "memory": found,
        "plain_text": {name: cost[name] for name in names},
        "novels": [novel.name for novel in novels],
        "config": own.to_dict(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("novels", type=Path, nargs="+", help="text files that no training has seen")
    parser.add_argument("--rounds", type=int, default=8, help=f"of {STREAMS * QUESTIONS} questions")
    parser.add_argument("--training", type=Path, nargs="*", default=[], help="folders of the runs, one after the other")
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    model, tokenizer = load_with_tokenizer(given.model)
    record = {
        "recipe": "smollm2",
        **measure(model, tokenizer, given.novels, given.rounds),
        "circumstances": run_info(seeds={"facts": SEED}),
    }
    record["training"] = [
        {name: run[name] for name in ("steps", "seconds", "seeds", "starts")}
        for run in (json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in given.training)
    ]
    write(given.record, record)
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
