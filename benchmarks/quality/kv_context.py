"""What a chunk of a memory of keys and values should be written behind: nothing, or the newest chunks of its source.

    mplus get smollm2                                      # once
    python -m benchmarks.quality.kv_context                # writes records/kv_context.json

A chat model that people have is told notes about 12 people, 4 facts each, all from one source, and is asked for facts.
Which chunks come back is said by hand, so that nothing but the rows differs: the right one alone, or the right one
next to the question behind three others.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus
from benchmarks.records import record_path, write
from mplus.config import JsonValue
from mplus.environment import run_info
from mplus.evaluation.reports.cell import wilson
from mplus.evaluation.tasks.base import Question
from mplus.evaluation.tasks.notes import Notes
from mplus.evaluation.texts import Texts
from mplus.hf.pretrained.smollm2 import smollm2_folder
from mplus.mechanisms.kv.chat import ChatFormat
from mplus.memory import Memory
from mplus.retrievers.chunks import CHUNK_RETRIEVERS, ChunkRetriever, Chunks, Query

RECORD = record_path("quality", "kv_context")
CONTEXTS = (0, 1, 2)
RETRIEVED = (1, 4)
SEPARATOR = "\n\n"
"""Behind every note, so that the question does not begin in the middle of its line."""


class Given(ChunkRetriever):
    """A retriever that scores chunks as it was told to."""

    name = "given"
    wanted: ClassVar[list[int]] = []
    """Places of chunks, the best first."""

    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        """Return how early each chunk comes among those that are wanted; 0: not at all."""
        found = torch.zeros(len(chunks), dtype=torch.float64)
        for place, chunk in enumerate(self.wanted):
            found[chunk] = len(self.wanted) - place
        return found


def wrapped(decoder: Any, context: int, chunks: int) -> Any:
    """Return the decoder with a memory that brings back as many chunks as it is told."""
    mechanism: dict[str, JsonValue] = {"name": "kv", "context_chunks": context, "retrieved_chunks": chunks, "rerank": 0}
    return mplus.wrap(decoder, {"mechanism": mechanism, "retriever": "given"})


def asked(tokenizer: Any, question: str) -> Tensor:
    """Return the ids ``[1, n]`` of a question behind the opening of the user's turn, and what closes it."""
    turn = [{"role": "user", "content": question}]
    told = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(told, add_special_tokens=False, return_tensors="pt")["input_ids"]
    chat = ChatFormat.of(tokenizer)
    if chat is None:
        raise SystemExit("the tokenizer must have a chat template")
    found: Tensor = ids[:, len(chat.prefix) :]
    return found


@torch.no_grad()
def right(model: Any, tokenizer: Any, memory: Memory, question: Question, among: list[int]) -> bool:
    """Ask one question, with the chunk it needs and ``among``, and return whether the answer has the value."""
    Given.wanted = [question.needs[0], *among]
    ids = asked(tokenizer, question.prompt)
    said = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), memory=memory, max_new_tokens=14, do_sample=False
    )
    answer = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).lower()
    return any(value.lower() in answer for value in question.answers)


def measure(questions: int, episodes: int) -> list[dict[str, Any]]:
    """Measure all settings on the same questions."""
    folder = smollm2_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    decoder = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    task = Notes(Notes.Options(notes=48, questions=questions, episodes=episodes, split="choose"), Texts(tokenizer))
    cells = []
    for context in CONTEXTS:
        for chunks in RETRIEVED:
            begun, found = time.perf_counter(), list[bool]()
            for episode in task.episodes():
                model = wrapped(decoder, context, chunks)
                memory = model.new_memory(tokenizer=tokenizer)
                for passage in episode.passages:
                    memory.write(passage.text + SEPARATOR, source="notes")
                rng = random.Random(episode.number)  # noqa: S311 - reproducible
                for question in episode.questions:
                    others = [place for place in range(len(episode.passages)) if place not in question.needs]
                    found.append(right(model, tokenizer, memory, question, rng.sample(others, chunks - 1)))
                mplus.unwrap(model)
            share, low, high = sum(found) / len(found), *wilson(sum(found), len(found))
            cell = {"context_chunks": context, "chunks": chunks, "right": share, "low": low, "high": high}
            cells.append({**cell, "questions": len(found), "seconds": round(time.perf_counter() - begun, 1)})
            print(json.dumps(cells[-1]), flush=True)
    return cells


def main(arguments: list[str]) -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--episodes", type=int, default=1)
    options = parser.parse_args(arguments)
    CHUNK_RETRIEVERS.register("given", Given)
    try:
        cells = measure(options.questions, options.episodes)
    finally:
        CHUNK_RETRIEVERS.unregister("given")
    write(RECORD, {"program": "benchmarks.quality.kv_context", **run_info(), "cells": cells})


if __name__ == "__main__":
    main(sys.argv[1:])
