"""The demo of recall: facts told once to a chat, many others after them, then questions; and the curves behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import cast

import attrs
import torch
from attrs import define
from torch import Tensor

from mplus.config import JsonValue
from mplus.errors import InputError
from mplus.evaluation.execution import ParallelStreams
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports.report import Report
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts
from mplus.facts.episodes import draw_facts, make_episode, told_chunk
from mplus.facts.language import UNKNOWN, Language
from mplus.hf.decoders.train_model import TrainTokenizer
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.pretrained.shipped import load_recall
from mplus.memory import Memory

HELP = """
Tell a fact:  colour of ada baker red .
Ask for one:  colour of ada baker
Relations are {relations}; end with an empty line.
"""


@define(frozen=True)
class Answer:
    """An answer of the decoder to one question.

    Attributes:
        question: four words.
        words: what it said.
        source: where the retrieved row with the best score was written from; None: nothing was retrieved.
        age: chunks told since that row was written; None likewise.
        known: probability, by the decoder, that the answer is not "unknown".
    """

    question: str
    words: str
    source: str | None
    age: int | None
    known: float


class Chat:
    """Tells facts to one memory, and asks for them.

    Attributes:
        model: the wrapped decoder.
        memory: what it was told.
        language: of the decoder.
    """

    def __init__(self, model: MemoryModel, tokenizer: TrainTokenizer, language: Language, seed: int) -> None:
        self.model = model
        self.language = language
        self.memory: Memory = model.new_memory(tokenizer=tokenizer, seed=seed)
        self._tokenizer = tokenizer
        self._generator = torch.Generator().manual_seed(seed)

    def tell(self, sentence: str, source: str) -> None:
        """Write a fact. Raises InputError when it is none of this language; nothing is written then."""
        chunk = told_chunk(self.language, sentence, self.model.mplus_config.chunk_tokens, self._generator)
        self.write(chunk, source)

    def write(self, chunk: Tensor, source: str) -> None:
        """Write a chunk ``[n]`` as it is."""
        self.memory.write_chunk(chunk[None], source=source)

    @torch.no_grad()
    def ask(self, question: str, memory: Memory | None = None) -> Answer:
        """Ask for a fact, with this memory or another. Raises InputError when it is no question of this language."""
        fact = self.language.fact(question)
        memory = self.memory if memory is None else memory
        prompt = self._tokenizer(question, return_tensors="pt", add_special_tokens=False)
        tokens = len(self.language.value(fact, 0))
        said = self.model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            memory=memory,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_sources=True,
            output_logits=True,
        )
        answer = said.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        unknown = float(said.logits[0][0].softmax(-1)[self.language.ids[UNKNOWN]])
        spoken = [self.language.vocabulary[token] for token in answer]
        rows = [row for layer in said.memory_sources[0] for row in layer if row.score is not None]
        best = max(rows, key=lambda row: row.score, default=None)
        k = self.model.mplus_config.memory_tokens_per_chunk
        return Answer(
            question=" ".join(question.lower().split()),
            words=spoken[0] if spoken[0] == UNKNOWN else " ".join(spoken),
            source=None if best is None else best.source,
            age=None if best is None else best.age // k,
            known=1 - unknown,
        )


def converse(chat: Chat, read: Callable[[str], str] = input, say: Callable[[str], None] = print) -> None:
    """Read lines until an empty one or the end of input; what is wrong is said, and the conversation goes on."""
    say(HELP.format(relations=", ".join(chat.language.relation_names)))
    turns = 0
    while True:
        try:
            line = read("> ").strip(" ?.\t")
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        turns += 1
        try:
            if len(line.split()) <= 4:
                answer = chat.ask(line)
                age = "" if answer.age is None else f", {answer.age} chunks ago"
                say(f"{answer.words}   (known: {answer.known:.2f}; best row: {answer.source or '-'}{age})")
            else:
                chat.tell(line, f"you {turns}")
                say("told.")
        except InputError as error:
            say(str(error))


ARMS = ("none", "window", "memoryllm", "mplus-random", "mplus")
AGES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
ROUNDS = 8
UNTOLD = 2
"""Questions about facts that were never told."""


@define(frozen=True, kw_only=True)
class Asked:
    """One question of the demo.

    Attributes:
        told_as: name the fact was told under; None where it never was told.
        value: the right answer; None likewise.
        age: chunks told since.
        answer: with all of memory.
        short_term: the answer without long-term memory (MemoryLLM).
    """

    told_as: str | None
    value: str | None
    age: int | None
    answer: Answer
    short_term: Answer

    @property
    def right(self) -> bool:
        """Return whether memory gave the right answer; for an untold fact that is "unknown"."""
        return self.answer.words == (self.value or "unknown")


@define(kw_only=True)
class RecallDemo:
    """The findings of the demo.

    Attributes:
        parameters: of the decoder, with all that memory adds.
        training_seconds: None where the shipped checkpoint was used.
        facts, chunks, tokens: told in all.
        long_term_rows, attended: rows kept per layer, and rows and tokens that an answer attends to.
        asked: the questions.
        curves: accuracy over age.
        seed, threads, seconds: of this run.
    """

    parameters: int
    training_seconds: float | None
    facts: int
    chunks: int
    tokens: int
    long_term_rows: int
    attended: int
    asked: list[Asked]
    curves: Report
    seed: int
    threads: int
    seconds: float = 0.0

    def plain(self) -> dict[str, JsonValue]:
        """Return this as plain data."""
        plain = attrs.asdict(self, filter=lambda attribute, _: attribute.name not in {"curves", "asked"})
        asked = [{**attrs.asdict(one), "right": one.right} for one in self.asked]
        return {**plain, "asked": asked, "curves": self.curves.plain()}


def run(
    *, train: bool, facts: int, distraction: int, streams: int, seed: int, threads: int, quiet: bool
) -> tuple[RecallDemo, Chat]:
    """Do all of it; returns what was found and the chat, to go on with."""
    model, tokenizer, seconds = trained(seed, quiet) if train else (*load_recall(), None)
    model.train(False)
    chat = Chat(model, tokenizer, Language(), seed)
    asked = told_and_asked(chat, facts, distraction, seed)
    ages = tuple(age for age in AGES if age <= max(distraction, 16))
    memory, config = chat.memory, model.mplus_config
    task = Facts(
        chunk_tokens=config.chunk_tokens,
        tail=config.memory_tokens_per_chunk,
        ages=ages,
        streams=streams,
        rounds=ROUNDS,
        seed=seed + 1,
    )
    curves = retention(ParallelStreams(model, task), ArmOptions(arms=ARMS))
    return (
        RecallDemo(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            training_seconds=seconds,
            facts=facts,
            chunks=facts + distraction,
            tokens=(facts + distraction) * config.chunk_tokens,
            long_term_rows=memory.stores[0].count(0),
            attended=model.mplus_engine.mechanism.attended_rows(memory.snapshot()[0]) + 4,
            asked=asked,
            curves=curves,
            seed=seed,
            threads=threads,
        ),
        chat,
    )


def trained(seed: int, quiet: bool) -> tuple[MemoryModel, TrainTokenizer, float]:
    """Train a decoder by the shipped recipe; return it, its tokenizer, and the seconds that took."""
    from mplus.training import train

    begun = time.perf_counter()
    result = train("recall-tiny", seed=seed, progress=False if quiet else None)
    return cast("MemoryModel", result.model), cast("TrainTokenizer", result.tokenizer), time.perf_counter() - begun


def told_and_asked(chat: Chat, facts: int, distraction: int, seed: int) -> list[Asked]:
    """Tell ``facts`` facts by name, then as many others as asked for, and put the questions."""
    language, config = chat.language, chat.model.mplus_config
    generator = torch.Generator().manual_seed(seed)
    numbers = draw_facts(language, facts + distraction + UNTOLD, held_out=True, siblings=0.25, generator=generator)
    sizes = {"chunk_tokens": config.chunk_tokens, "tail": config.memory_tokens_per_chunk}
    episode = make_episode(language, numbers, **sizes, generator=generator)
    told = facts + distraction
    for place in range(told):
        name = f"note {place + 1}" if place < facts else f"chunk {place + 1}"
        chat.write(episode.chunks[place], name)
    without = short_term_only(chat.memory)
    asked = []
    for place in [*range(facts), *range(told, told + UNTOLD)]:
        question = " ".join(language.question(numbers[place]))
        was_told = place < facts
        asked.append(
            Asked(
                told_as=f"note {place + 1}" if was_told else None,
                value=" ".join(language.value(numbers[place], episode.values[place])) if was_told else None,
                age=told - 1 - place if was_told else None,
                answer=chat.ask(question),
                short_term=chat.ask(question, without),
            )
        )
    return asked


def short_term_only(memory: Memory) -> Memory:
    """Return the same memory without its long-term rows."""
    twin = memory.fork()
    for store in twin.stores:
        for layer in range(store.layout.layers):
            store.remove(layer, store.ids(layer))
    return twin


def right(asked: Sequence[Asked]) -> int:
    """Return the number of right answers."""
    return sum(one.right for one in asked)
