"""Arms that read what was told as text in front of the question: nothing, the newest part, or all of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from mplus.errors import InputError
from mplus.evaluation.arms.base import ID_BYTES, Bench, Due, Reply, TextArm
from mplus.evaluation.generating import answers
from mplus.memory.memory import Memory


class PromptArm(TextArm):
    """The decoder alone, with a part of what was told in its prompt."""

    def reply(self, due: Sequence[Due], memory: Memory) -> list[Reply | None]:
        bench, generation = self.bench, self.bench.generation
        contexts = [self.context(one) for one in due]
        places = [place for place, context in enumerate(contexts) if context is not None]
        prompts = [
            generation.prompt([*(contexts[place] or ()), *bench.texts.ids(due[place].question.prompt)], memory=False)
            for place in places
        ]
        replies: list[Reply | None] = [None] * len(due)
        made = answers(bench.model, bench.tokenizer, prompts, generation) if prompts else []
        for place, prompt, one in zip(places, prompts, made, strict=True):
            replies[place] = Reply(one.text, ID_BYTES * self.kept_tokens(due[place]), len(prompt), one)
        return replies

    @abstractmethod
    def context(self, due: Due) -> list[int] | None:
        """Ids in front of the question; None: it does not fit."""

    @abstractmethod
    def kept_tokens(self, due: Due) -> int:
        """Tokens of what was told that have to be kept until the question."""

    def told(self, due: Due) -> list[int]:
        """The ids of everything told so far, and of the separator behind it."""
        separator = self.bench.separator
        told = due.episode.passages[: due.told]
        return [token for passage in told for token in self.bench.texts.ids(passage.text + separator)]


class NoMemory(PromptArm):
    """The question only: what the decoder knows by itself (borderline). Each question is asked once."""

    name: ClassVar[str] = "none"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self._known: dict[tuple[int, int], Reply] = {}

    def reply(self, due: Sequence[Due], memory: Memory) -> list[Reply | None]:
        new = {(one.episode.number, one.number): one for one in due}
        new = {key: one for key, one in new.items() if key not in self._known}
        for key, reply in zip(new, super().reply(list(new.values()), memory), strict=True):
            if reply is not None:
                self._known[key] = reply
        return [self._known[one.episode.number, one.number] for one in due]

    def context(self, due: Due) -> list[int]:
        return []

    def kept_tokens(self, due: Due) -> int:
        return 0


class Window(PromptArm):
    """The last ``tokens`` tokens of what was told."""

    name: ClassVar[str] = "window"

    def __init__(self, bench: Bench, tokens: int) -> None:
        super().__init__(bench)
        if tokens < 1:
            raise InputError(f"a window must have at least 1 token, got {tokens}")
        self.tokens = tokens

    def context(self, due: Due) -> list[int]:
        return self.told(due)[-self.tokens :]

    def kept_tokens(self, due: Due) -> int:
        return min(self.tokens, len(self.told(due)))

    def is_inside(self, due: Due) -> bool:
        """Whether all passages that the answer needs lie in the window as a whole."""
        separator = self.bench.separator
        first = min(due.question.needs, default=0)
        since = due.episode.passages[first : due.told]
        return sum(self.bench.texts.count(passage.text + separator) for passage in since) <= self.tokens

    def settings(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


class FullContext(PromptArm):
    """Everything told so far, where that and the answer fit into ``positions``."""

    name: ClassVar[str] = "full-context"

    def __init__(self, bench: Bench, positions: int) -> None:
        super().__init__(bench)
        self.positions = positions

    def context(self, due: Due) -> list[int] | None:
        told = self.told(due)
        question = self.bench.texts.ids(due.question.prompt)
        whole = len(self.bench.generation.prompt([*told, *question], memory=False)) + self.bench.generation.tokens
        return told if whole <= self.positions else None

    def kept_tokens(self, due: Due) -> int:
        return len(self.told(due))

    def settings(self) -> dict[str, Any]:
        return {"positions": self.positions}
