"""The demo's second half: the memory is saved and taken up again, here and in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cattrs
import torch

import mplus
from mplus.cli.demo.report import Continuation, Saved
from mplus.errors import MPlusError
from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.memory import Memory

TOKENS = 48
"""Length of the continuation."""

STORY = "the story told so far"
"""Source name of what both processes write."""

MODEL, MEMORY, IDS = "model", "memory", "story.json"
"""What is in the folder."""


def save_and_continue(model: Any, memory: Memory, story: Sequence[int], folder: Path, threads: int) -> Saved:
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


def continue_story(model: Any, memory: Memory, story: Sequence[int]) -> Continuation:
    """Write the story into memory, which draws rows that leave the STM, and go on telling it greedily."""
    tokenizer = load_tokenizer()
    memory.write(list(story), source=STORY, progress=False)
    text = torch.tensor([[tokenizer.bos_token_id, *story]])
    told = model.generate(
        input_ids=text,
        attention_mask=torch.ones_like(text),
        memory=memory,
        do_sample=False,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
    )[0, text.shape[1] :]
    return Continuation(
        text=tokenizer.decode(told),
        tokens=tuple(told.tolist()),
        births=tuple(
            tuple(rows.birth.tolist()) for parts in memory.states[0].row_lists().values() for rows in parts if len(rows)
        ),
    )


def _in_new_process(folder: Path, threads: int) -> Continuation:
    """What ``continue_saved`` returns in a Python process of its own."""
    command = [sys.executable, "-m", "mplus.cli", "demo-continue", str(folder), "--threads", str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own program
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        raise MPlusError(
            f"a new process must be able to go on with what was saved in {folder}, "
            f"it ended with exit code {child.returncode}: {last}"
        )
    return cattrs.structure(json.loads(child.stdout), Continuation)
