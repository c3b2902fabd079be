"""A million tokens of novels behind a thousand tokens of facts, in a memory that lies on disk.

    python -m benchmarks.memory.million novels/*.txt.gz              # writes records/million.json
    python -m benchmarks.memory.million novels/*.txt --tokens 100000 --store ram

The decoder is recall-tiny: it is told facts in its little language, reads the novels, and is asked for the facts now
and then. Its tokenizer turns every word it does not know into a filler.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define

import mplus
from benchmarks.records import record_path, write
from mplus.environment import run_info
from mplus.facts.episodes import draw_facts, make_episode, recall_tokenizer
from mplus.facts.language import Language
from mplus.hf.pretrained.config import read_config
from mplus.hf.pretrained.load import without_bars
from mplus.hf.pretrained.shipped import RECALL_TINY
from mplus.memory import Memory

RECORD = record_path("memory", "million")
FACT_TOKENS = 1000
ASKED_AFTER = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000, 300_000, 500_000, 700_000, 1_000_000)
PIECE = 4096
"""Most tokens written at a time, after which the process's memory is looked at."""
BUDGET_SHARE = 8
"""The budget of anonymous memory is what the store takes on disk, divided by this."""


@define(frozen=True)
class Fact:
    """A fact that was told, and how it is asked for."""

    source: str
    question: list[int]
    value: int


def told(memory: Memory, language: Language, chunk_tokens: int, tail: int, seed: int) -> list[Fact]:
    """Tell as many facts as the first thousand tokens hold, a chunk each."""
    generator = torch.Generator().manual_seed(seed)
    facts = draw_facts(language, FACT_TOKENS // chunk_tokens, False, 0.25, generator)
    episode = make_episode(language, facts, chunk_tokens=chunk_tokens, tail=tail, generator=generator)
    made = []
    for number, (fact, value) in enumerate(zip(episode.facts, episode.values, strict=True)):
        memory.write_chunk(episode.chunks[number][None], source=f"fact {number}")
        (word,) = language.value(fact, value)
        question = [language.ids[part] for part in language.question(fact)]
        made.append(Fact(f"fact {number}", question, language.ids[word]))
    return made


def asked(model: Any, memory: Memory, facts: Sequence[Fact]) -> dict[str, Any]:
    """Ask for all facts; return accuracy, and how many of a fact's long-term rows came back."""
    begun = time.perf_counter()
    ids = torch.tensor([fact.question for fact in facts])
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        memory=memory.select([0] * len(facts)),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_sources=True,
    )
    seconds = time.perf_counter() - begun
    right = sum(int(row[-1]) == fact.value for row, fact in zip(said.sequences, facts, strict=True))
    kept = {source.name: source for source in memory.sources()}
    found = [0] * len(said.memory_sources[0])
    for fact, layers in zip(facts, said.memory_sources, strict=True):
        for layer, rows in enumerate(layers):
            found[layer] += sum(row.source == fact.source for row in rows)
    stored = sum(kept[fact.source].held["long-term"] for fact in facts)  # of one layer, on average
    return {
        "accuracy": right / len(facts),
        "gold_recall_by_layer": [round(count / stored, 4) if stored else None for count in found],
        "gold_rows_per_fact": round(stored / len(facts), 3),
        "seconds": round(seconds, 3),
    }


def novels(paths: Sequence[Path], tokenizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the novels' ids with their names, a few pages at a time: a tokenised novel takes 100 MB."""
    for path in paths:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            while lines := file.readlines(4 * PIECE):
                ids = tokenizer("".join(lines), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
                yield path.name.partition(".")[0], ids


def resident() -> dict[str, int]:
    """Return the bytes of this process in memory: anonymous, and mapped from files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("anonymous", "RssAnon"), ("file", "RssFile"))}


def occupied(folder: Path) -> int:
    """Return the bytes that the files in ``folder`` take on disk."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


@torch.no_grad()
def measure(paths: Sequence[Path], tokens: int, store: Any, folder: Path, seed: int) -> dict[str, Any]:
    """Tell the facts, write the novels, and ask now and then."""
    settings = read_config(RECALL_TINY)
    settings.mplus["long_term_tokens"] = None  # nothing is evicted
    with without_bars():
        model = mplus.from_pretrained(RECALL_TINY, config=settings, local_files_only=True).eval()
    language, config = Language(), model.mplus_config
    tokenizer = recall_tokenizer(language)
    memory = model.new_memory(tokenizer=tokenizer, seed=seed, store=store)
    facts = told(memory, language, config.chunk_tokens, config.memory_tokens_per_chunk, seed)
    written = len(facts) * config.chunk_tokens
    after = {written: asked(model, memory, facts)}
    before = resident()  # with the decoder, and all that PyTorch sets up when it first computes
    peak = dict(before)
    moments = iter([moment for moment in ASKED_AFTER if written < moment < tokens] + [tokens])
    moment, begun, writing = next(moments), time.perf_counter(), 0.0
    for name, ids in novels(paths, tokenizer):
        place = 0
        while place < len(ids) and tokens - written >= config.min_chunk_tokens:
            piece = ids[place : place + min(PIECE, moment - written)]
            if len(piece) < config.min_chunk_tokens:
                break  # the last words of these pages
            start = time.perf_counter()
            memory.write(piece, source=name, progress=False)
            writing += time.perf_counter() - start
            place, written = place + len(piece), written + len(piece)
            peak = {kind: max(peak[kind], size) for kind, size in resident().items()}
            if moment - written < config.min_chunk_tokens:
                after[written] = asked(model, memory, facts)
                sys.stderr.write(f"{written:>9,} tokens: {after[written]}\n")
                moment = next(moments, tokens)
    if tokens - written >= config.min_chunk_tokens:
        raise SystemExit(f"the novels must have {tokens - written:,} tokens more: name further ones")
    disk = occupied(folder)
    return {
        "tokens": written,
        "facts": len(facts),
        "long_term_rows": memory.stores[0].count(0),
        "layers": memory.stores[0].layout.layers,
        "row_bytes": memory.stores[0].layout.row_bytes,
        "disk_bytes": disk,
        "anonymous_budget_bytes": disk // BUDGET_SHARE,
        "anonymous_growth_bytes": peak["anonymous"] - before["anonymous"],
        "anonymous_with_model_bytes": peak["anonymous"],
        "file_mapped_peak_bytes": peak["file"],
        "after_tokens": {str(count): found for count, found in after.items()},
        "writing_seconds": round(writing, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("novels", nargs="+", type=Path, help="text files, plain or gzip")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--store", default="mmap")
    parser.add_argument("--bytes-in-memory", type=int, default=2**24, help="of rows that are not in a file yet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        store: dict[str, Any] = {"name": given.store}
        if given.store == "mmap":
            store.update(directory=folder, bytes_in_memory=given.bytes_in_memory)
        found = measure(given.novels, given.tokens, store, Path(folder), given.seed)
    record = {
        "store": store["name"],
        "bytes_in_memory": given.bytes_in_memory,
        "threads": given.threads,
        **found,
        "circumstances": run_info(),
    }
    write(given.record, record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
