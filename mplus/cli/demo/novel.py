"""The demo: a decoder reads a novel into its memory, tells a story with it, and is saved and taken up elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import cattrs
import torch
from torch import Tensor

import mplus
from mplus.cli.demo.report import (
    Continuation,
    DemoReport,
    LayerRows,
    Positions,
    RetrievedFrom,
    Saved,
    Story,
    Timing,
)
from mplus.errors import MPlusError
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.pretrained.shipped import AUTHOR, TITLE, Chapter, load_decoder, load_tokenizer
from mplus.hf.reading.reading import RetrievedSource
from mplus.memory import Memory
from mplus.memory.report import progress_bar
from mplus.memory.writing.chunking import split

if TYPE_CHECKING:
    from mplus.hf.types import PreTrainedModel, PreTrainedTokenizerBase

P = ParamSpec("P")
R = TypeVar("R")

PROMPT = "Mary put the old key into the door of the secret garden and"
STORY_TOKENS = 64
READ_CHUNKS = 16
"""Chunks that the reading speed is measured on, spread over the novel."""

CONTINUATION_TOKENS = 48
STORY = "the story told so far"
"""Source name of what both processes write."""

MODEL, MEMORY, IDS = "model", "memory", "story.json"
"""What is in the folder."""


def demo_config() -> mplus.MPlusConfig:
    """Return sizes for a decoder of 512 positions: a write takes 1 + 32 + 256, a read 1 + 96 + 128 + text."""
    return mplus.MPlusConfig(
        chunk_tokens=256,
        min_chunk_tokens=8,
        memory_tokens_per_chunk=32,
        short_term_tokens=128,
        retrieved_tokens=96,
        long_term_tokens=40_000,
        retriever={"name": "linear", "width": 32},
        adapters=None,
    )


def run(
    texts: Sequence[tuple[str, Tensor]], tokenizer: PreTrainedTokenizerBase, *, seed: int, threads: int, folder: Path
) -> DemoReport:
    """Do all of it.

    Args:
        texts: name and ids ``[n]`` of each chapter.
        tokenizer: of the shipped decoder.
        seed: of the retriever's initial weights and of the draws of which rows leave the STM.
        threads: CPU threads for torch, here and in the new process.
        folder: where decoder and memory are saved.
    """
    started = time.perf_counter()
    base, model = load_decoder(), with_memory(load_decoder(), seed)
    memory = model.new_memory(tokenizer=tokenizer, seed=seed)
    write, chunks = write_novel(base, memory, texts)
    read = read_novel(base, model, memory, torch.cat([ids for _, ids in texts]))
    story, ids, retrieved = tell(base, model, memory, tokenizer)
    layers, size = layer_rows(memory, retrieved), memory.nbytes
    return DemoReport(
        novel=f"{TITLE} ({AUTHOR})",
        parameters=sum(parameter.numel() for parameter in base.parameters()),
        config=model.mplus_config.to_dict(),
        threads=threads,
        seed=seed,
        tokens=write.tokens,
        chunks=chunks,
        chapters=len(texts),
        layers=layers,
        bytes=size,
        positions=positions(model),
        write=write,
        read=read,
        story=story,
        saved=save_and_continue(model, memory, ids, folder, threads),
        seconds=time.perf_counter() - started,
    )


def tokenize(
    chapters: Sequence[Chapter], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[tuple[str, Tensor]]:
    """Return name and ids ``[n]`` int64 of each chapter; of all together only the first ``limit`` tokens."""
    texts, left = [], sys.maxsize if limit is None else limit
    for chapter in chapters:
        ids = torch.tensor(tokenizer(chapter.text, add_special_tokens=False, verbose=False)["input_ids"][:left])
        texts.append((chapter.name, ids))
        left -= len(ids)
        if left < demo_config().min_chunk_tokens:
            break
    return texts


def with_memory(decoder: PreTrainedModel, seed: int) -> MemoryModel:
    """Wrap the decoder in place; the retriever's weights are random and depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped: MemoryModel = mplus.wrap(decoder, demo_config())
    return wrapped


def write_novel(base: PreTrainedModel, memory: Memory, texts: Sequence[tuple[str, Tensor]]) -> tuple[Timing, int]:
    """Write every chapter under its name and, in turn with that, run ``base`` over the same chunks without logits.

    Returns the times and the number of chunks.
    """
    config = memory.engine.config
    first = texts[0][1][: config.chunk_tokens]
    memory.fork().write(first)  # what happens only the first time is not to be timed
    _forward_all(base, [first])
    tokens, chunks, seconds, base_seconds = 0, 0, 0.0, 0.0
    total = sum(len(ids) for _, ids in texts)
    with progress_bar(f"reading {TITLE}", total, None, steps=total // config.chunk_tokens) as advance:
        for name, ids in texts:
            report = memory.write(ids, source=name, progress=False)
            tokens, chunks, seconds = tokens + report.tokens[0], chunks + report.chunks[0], seconds + report.seconds
            base_seconds += timed(_forward_all, base, split(ids, config.chunk_tokens, config.min_chunk_tokens))
            advance(report.tokens[0])
    return Timing(tokens=tokens, seconds=seconds, base_seconds=base_seconds), chunks


@torch.no_grad()
def _forward_all(base: PreTrainedModel, chunks: Sequence[Tensor]) -> None:
    for chunk in chunks:
        base.base_model(chunk[None], use_cache=False)


@torch.no_grad()
def read_novel(base: PreTrainedModel, model: MemoryModel, memory: Memory, ids: Tensor) -> Timing:
    """Run the decoder over chunks from all over the novel with memory (retrieval each time) and without, in turn."""
    chunks = list(ids.split(memory.engine.config.chunk_tokens))
    chunks = chunks[:: max(1, len(chunks) // READ_CHUNKS)][:READ_CHUNKS]
    seconds = base_seconds = 0.0
    for chunk in chunks:
        text = {"input_ids": chunk[None], "use_cache": False, "logits_to_keep": 1}
        seconds += timed(model, **text, memory=memory)
        base_seconds += timed(base, **text)
    return Timing(tokens=sum(map(len, chunks)), seconds=seconds, base_seconds=base_seconds)


def timed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> float:
    """Return the seconds that a call took."""
    started = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - started


def tell(
    base: Any, model: MemoryModel, memory: Memory, tokenizer: PreTrainedTokenizerBase
) -> tuple[Story, list[int], list[list[RetrievedSource]]]:
    """Tell a story with memory and without; return it, its ids, and per layer the rows retrieved for it."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    inputs = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]}
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": STORY_TOKENS}
    output = model.generate(**inputs, **greedy, memory=memory, return_dict_in_generate=True, output_sources=True)
    alone = base.generate(**inputs, **greedy)
    layers: list[list[RetrievedSource]] = output.memory_sources[0]
    start = inputs["input_ids"].shape[1]
    story = Story(
        prompt=PROMPT,
        with_memory=str(tokenizer.decode(output.sequences[0, start:], skip_special_tokens=True)),
        without_memory=str(tokenizer.decode(alone[0, start:], skip_special_tokens=True)),
        sources=retrieved_from([row for layer in layers for row in layer]),
    )
    special = set(tokenizer.all_special_ids)
    return story, [token for token in output.sequences[0].tolist() if token not in special], layers


def retrieved_from(rows: Sequence[RetrievedSource]) -> tuple[RetrievedFrom, ...]:
    """Return retrieved rows by source, the largest share first."""
    ages: dict[str | None, list[int]] = {}
    for row in rows:
        ages.setdefault(row.source, []).append(row.age)
    found = [
        RetrievedFrom(source=name, rows=len(some), newest_age=min(some), oldest_age=max(some))
        for name, some in ages.items()
    ]
    return tuple(sorted(found, key=lambda entry: (-entry.rows, entry.newest_age)))


def layer_rows(memory: Memory, retrieved: Sequence[Sequence[RetrievedSource]]) -> tuple[LayerRows, ...]:
    """Return the numbers of rows in each layer of the first stream, and the ages of the retrieved ones."""
    state, store = memory.states[0], memory.stores[0]
    held = {state.lists[name]: counts for name, counts in state.counts().items()}
    found = []
    for layer, rows in enumerate(retrieved):
        ages = [row.age for row in rows]
        found.append(
            LayerRows(
                held={name: counts[layer] for name, counts in held.items()},
                long_term=store.count(layer),
                retrieved=len(ages),
                newest_age=min(ages, default=None),
                median_age=median_low(ages) if ages else None,
                oldest_age=max(ages, default=None),
            )
        )
    return tuple(found)


def positions(model: MemoryModel) -> Positions:
    """Return the positions that the longest write and the longest read of this demo take."""
    config = model.mplus_config
    return Positions(
        trained=model.config.max_position_embeddings,
        layout=model.mplus_engine.retrofit.positions.layout,
        writing=1 + config.memory_tokens_per_chunk + config.chunk_tokens,
        reading=1 + config.retrieved_tokens + config.short_term_tokens + config.chunk_tokens,
    )


def save_and_continue(model: MemoryModel, memory: Memory, story: Sequence[int], folder: Path, threads: int) -> Saved:
    """Save decoder, memory and the ids of the story, then go on telling it in this process and in a new one."""
    memory.save(folder / MEMORY)
    model.save_pretrained(folder / MODEL, save_base=True)
    (folder / IDS).write_text(json.dumps(list(story)) + "\n", encoding="utf-8")
    return Saved(
        folder=str(folder),
        bytes=sum(file.stat().st_size for file in (folder / MEMORY).iterdir()),
        here=continue_story(model, memory, story),
        in_new_process=_in_new_process(folder, threads),
    )


def continue_saved(folder: Path) -> Continuation:
    """Take up what ``save_and_continue`` saved."""
    model = mplus.from_pretrained(folder / MODEL)
    story = json.loads((folder / IDS).read_text(encoding="utf-8"))
    return continue_story(model, mplus.Memory.load(folder / MEMORY, model), story)


def continue_story(model: MemoryModel, memory: Memory, story: Sequence[int]) -> Continuation:
    """Write the story into memory, which draws rows that leave the STM, and go on telling it greedily."""
    tokenizer = load_tokenizer()
    memory.write(list(story), source=STORY, progress=False)
    text = torch.tensor([[tokenizer.bos_token_id, *story]])
    told = model.generate(
        input_ids=text,
        attention_mask=torch.ones_like(text),
        memory=memory,
        do_sample=False,
        min_new_tokens=CONTINUATION_TOKENS,
        max_new_tokens=CONTINUATION_TOKENS,
    )[0, text.shape[1] :]
    return Continuation(
        text=str(tokenizer.decode(told)),
        tokens=tuple(told.tolist()),
        births=tuple(
            tuple(rows.birth.tolist()) for parts in memory.states[0].row_lists().values() for rows in parts if len(rows)
        ),
    )


def _in_new_process(folder: Path, threads: int) -> Continuation:
    """Run ``continue_saved`` in a Python process of its own, and return its result."""
    command = [sys.executable, "-m", "mplus.cli", "demo-continue", str(folder), "--threads", str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own program
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        raise MPlusError(
            f"a new process must be able to go on with what was saved in {folder}, "
            f"it ended with exit code {child.returncode}: {last}"
        )
    return cattrs.structure(json.loads(child.stdout), Continuation)
