"""The demo on a chat model: it reads a novel with notes and a conversation in it, and is asked for what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from attrs import define, evolve

import mplus
from mplus.chat.prompt import ChatFormat
from mplus.cli.demo.chat.asking import Asker, Said
from mplus.cli.demo.chat.findings import JSON, ArmFinding, ChatDemo, Reopened
from mplus.cli.demo.chat.script import Question, Script, make_script
from mplus.errors import MPlusError
from mplus.evaluation.texts import Tokenizer
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.pretrained.chat_model import load_chat_model, with_memory
from mplus.hf.types import PreTrainedTokenizerBase
from mplus.memory import Memory
from mplus.memory.report import progress_bar

MEMORY, QUESTIONS = "memory", "questions.json"
"""What is in the folder."""
AGAIN = 5
"""Questions that the new process is asked: those that are answered one by one, and timed, here too."""
WITH, WITHOUT, WINDOW, TEXT = "memory", "nothing", "window", "found text"
"""Names of the ways to have the text."""


@define(frozen=True)
class ModelChoice:
    """A chat model and its memory: arguments of ``load_chat_model`` and ``with_memory``."""

    name: str
    mechanism: str | None
    pieces: int | None

    def load(self) -> tuple[MemoryModel, PreTrainedTokenizerBase]:
        """Return the decoder, wrapped, and its tokenizer. Raises as those two."""
        decoder, tokenizer = load_chat_model(self.name)
        return with_memory(decoder, self.mechanism, self.pieces), tokenizer


def run(
    choice: ModelChoice, *, tokens: int, seed: int, threads: int, folder: Path, quiet: bool
) -> tuple[ChatDemo, Asker, Memory]:
    """Do all of it.

    Args:
        choice: of the chat model.
        tokens: to tell, about.
        seed: of what is told and asked.
        threads: CPU threads, here and in the new process.
        folder: where the memory goes.
        quiet: show no progress.

    Returns:
        What was found, and the decoder and the memory (in ``folder``), to go on with.
    """
    started = time.perf_counter()
    model, tokenizer = choice.load()
    asker = Asker(model, ChatFormat(tokenizer))
    script = make_script(cast("Tokenizer", tokenizer), tokens, seed)
    with Memory.open(folder / MEMORY, model, tokenizer=tokenizer) as memory:
        write_seconds, places = tell(memory, script, quiet)
    arms, untold = question(asker, memory, script, quiet)
    reopened = ask_in_new_process(choice, arms[0].said[:AGAIN], folder, threads, quiet)
    memory = Memory.open(folder / MEMORY, model, tokenizer=tokenizer)
    where = {told.source: place for told, place in zip(script.told, places, strict=True)}
    findings = ChatDemo(
        model=choice.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mechanism=model.mplus_engine.mechanism.name,
        config=model.mplus_config.to_dict(),
        tokens=round(sum(source.tokens for source in memory.sources())),
        sources=len(script.told),
        write_seconds=write_seconds,
        places=tuple(where[one.question.source or ""] for one in arms[0].said),
        arms=arms,
        untold=untold,
        reopened=reopened,
        threads=threads,
        seed=seed,
        seconds=time.perf_counter() - started,
    )
    return findings, asker, memory


def tell(memory: Memory, script: Script, quiet: bool) -> tuple[float, list[float]]:
    """Write everything; return the seconds, and of each text how much had been told before it, from 0 to 1."""
    begun, before = time.perf_counter(), []
    total = len(script.told)
    with progress_bar("reading novel, notes and calls", total, _wanted(quiet), total, unit="texts") as advance:
        tokens = 0
        for told in script.told:
            before.append(tokens)
            tokens += sum(memory.write(told.text, source=told.source, progress=False).tokens)
            advance(1)
    return time.perf_counter() - begun, [place / max(tokens, 1) for place in before]


def question(
    asker: Asker, memory: Memory, script: Script, quiet: bool
) -> tuple[tuple[ArmFinding, ...], tuple[Said, ...]]:
    """Ask every question in every way; return that, and the answers to what was never told."""
    questions, told = script.answerable, {one.source: one.text for one in script.told}

    def texts(said: Said) -> list[str]:
        return [told[one.source or ""] for one in said.recalled]

    asked = _asking(quiet)
    remembered = asked(
        "with memory", lambda one: asker.ask(one, memory), lambda some: asker.ask_each(some, memory), questions
    )
    with progress_bar("asking never told", 1, _wanted(quiet), 1, unit="") as advance:
        untold = asker.ask_each(script.untold, memory)
        advance(1)
    alone = asked("without", asker.ask, asker.ask_each, questions)
    found = asked(
        "with the same text found",
        lambda one: asker.ask_with_text(one.question, texts(one)),
        lambda some: asker.ask_each([one.question for one in some], texts=[texts(one) for one in some]),
        remembered,
    )
    with progress_bar("reading what the window holds", 1, _wanted(quiet), 1, unit="") as advance:
        tokenizer, config = asker.format.tokenizer, asker.model.config.get_text_config(decoder=True)
        whole = "\n".join(told.text for told in script.told)
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        prefilled = asker.prefill(ids, questions, int(config.max_position_embeddings))
        advance(1)
    # One by one: side by side each would need a copy of the window.
    behind = asked("with a full window", lambda one: asker.ask_behind(one, prefilled), None, questions)
    text = sum(len(told.text.encode()) for told in script.told)
    arms = (
        ArmFinding(name=WITH, said=remembered, bytes=memory.nbytes),
        ArmFinding(name=WITHOUT, said=alone),
        ArmFinding(
            name=WINDOW,
            said=behind,
            bytes=prefilled.nbytes,
            prefill_seconds=prefilled.seconds,
            text_tokens=prefilled.text_tokens,
        ),
        ArmFinding(name=TEXT, said=found, bytes=text),
    )
    return arms, untold


T = TypeVar("T")


def _asking(quiet: bool) -> Callable[..., tuple[Said, ...]]:
    def asked(
        title: str,
        ask: Callable[[T], Said],
        ask_each: Callable[[Sequence[T]], tuple[Said, ...]] | None,
        questions: Sequence[T],
    ) -> tuple[Said, ...]:
        """Return an answer to every question: to the first ones one by one, to the rest side by side if they may be."""
        alone = questions if ask_each is None else questions[:AGAIN]
        with progress_bar(f"asking {title}", len(questions), _wanted(quiet), len(questions), unit="") as advance:
            found = []
            for one in alone:
                found.append(ask(one))
                advance(1)
            rest = questions[len(alone) :]
            if ask_each is not None and rest:
                found += ask_each(rest)
                advance(len(rest))
        return tuple(found)

    return asked


def _wanted(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def ask_in_new_process(
    choice: ModelChoice, said: tuple[Said, ...], folder: Path, threads: int, quiet: bool
) -> Reopened:
    """Return the answers of a Python process of its own, which opens the memory in ``folder``."""
    asked = JSON.unstructure({"model": choice, "questions": [one.question for one in said]})
    (folder / QUESTIONS).write_text(json.dumps(asked) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mplus.cli", "demo-reopen", str(folder), "--threads", str(threads)]
    begun = time.perf_counter()
    with progress_bar("asking a new process", 1, _wanted(quiet), 1, unit="") as advance:
        child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own program
        advance(1)
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        raise MPlusError(
            f"a new process must be able to answer from {folder}, it ended with {child.returncode}: {last}"
        )
    reopened = JSON.loads(child.stdout, Reopened)
    return evolve(reopened, seconds=time.perf_counter() - begun)


def reopen(folder: Path) -> Reopened:
    """Answer the questions in ``folder`` from the memory that lies there."""
    begun = time.perf_counter()
    asked = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
    model, tokenizer = JSON.structure(asked["model"], ModelChoice).load()
    asker = Asker(model, ChatFormat(tokenizer))
    questions = JSON.structure(asked["questions"], list[Question])
    opening = time.perf_counter()
    memory = mplus.Memory.open(folder / MEMORY, model, tokenizer=tokenizer, read_only=True)
    opened = time.perf_counter() - opening
    with torch.no_grad():
        said = tuple(asker.ask(one, memory) for one in questions)
    return Reopened(said=said, open_seconds=opened, seconds=time.perf_counter() - begun)
