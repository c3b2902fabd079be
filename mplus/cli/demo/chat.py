"""A chat in the little language of facts: what the demo tells and asks, and what a person may type after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import InputError
from mplus.facts import words
from mplus.facts.language import Language
from mplus.facts.speaker import told_chunk
from mplus.memory import Memory

HELP = """
Tell a fact:  colour of ada baker red .
Ask for one:  colour of ada baker
Relations are {relations}; end with an empty line.
"""


@define(frozen=True)
class Answer:
    """What the decoder answered to one question.

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

    def __init__(self, model: Any, tokenizer: Any, language: Language, seed: int) -> None:
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
        unknown = float(said.logits[0][0].softmax(-1)[self.language.ids[words.UNKNOWN]])
        spoken = [self.language.vocabulary[token] for token in answer]
        rows = [row for layer in said.memory_sources[0] for row in layer if row.score is not None]
        best = max(rows, key=lambda row: row.score, default=None)
        k = self.model.mplus_config.memory_tokens_per_chunk
        return Answer(
            question=" ".join(question.lower().split()),
            words=spoken[0] if spoken[0] == words.UNKNOWN else " ".join(spoken),
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
