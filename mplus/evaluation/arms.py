"""Arms: ways of answering what was told some time ago, by reading memory or the text itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import ClassVar, Generic

from mplus.config import JsonValue
from mplus.errors import InputError
from mplus.evaluation import require_extra
from mplus.evaluation.execution.base import Answer, Due, Execution, M, W


class EvaluationArm(ABC, Generic[M, W]):
    """One way of answering. Built with an execution and its own settings.

    Attributes:
        name: as in reports.
        uses_labels: it is told where the answer is, so that what was never told shows by itself.
    """

    name: ClassVar[str]
    uses_labels: bool = False

    def __init__(self, execution: Execution[M, W]) -> None:
        self.execution = execution

    @abstractmethod
    def answers(self, moment: M, due: Sequence[Due]) -> list[Answer | None]:
        """Answer ``due`` questions of a moment; None where this arm cannot, because something does not fit."""

    def answers_anew(self, moment: M, due: Sequence[Due]) -> list[Answer | None]:
        """Answer as ``answers``, with nothing remembered of earlier calls: to time it."""
        return self.answers(moment, due)

    def settings(self) -> dict[str, JsonValue]:
        """Return the arm's own settings, as plain data."""
        return {}


class MemoryArm(EvaluationArm[M, W]):
    """Reads memory in a ``way`` of the execution; all memory arms have the same weights and rows."""

    def __init__(self, execution: Execution[M, W], name: str, way: W) -> None:
        super().__init__(execution)
        self.name = name  # type: ignore[misc]
        self.way, self.uses_labels = way, name.endswith("-oracle")

    def answers(self, moment: M, due: Sequence[Due]) -> list[Answer | None]:
        return list(self.execution.read(moment, due, self.way))


class TextArm(EvaluationArm[M, W]):
    """The decoder alone, with a part of what was told in its prompt."""

    def answers(self, moment: M, due: Sequence[Due]) -> list[Answer | None]:
        contexts = self.contexts(due)
        fitting = [place for place, context in enumerate(contexts) if context is not None]
        asked = [due[place] for place in fitting]
        kept = [self.kept_tokens(one) for one in asked]
        made = self.execution.answer(asked, [contexts[place] or () for place in fitting], kept)
        found: list[Answer | None] = [None] * len(due)
        for place, answer in zip(fitting, made, strict=True):
            found[place] = answer
        return found

    def contexts(self, due: Sequence[Due]) -> list[list[int] | None]:
        """Return, for each question, the ids in front of it; None: they do not fit."""
        return [self.context(one) for one in due]

    @abstractmethod
    def context(self, due: Due) -> list[int] | None:
        """Return the ids in front of one question; None: they do not fit."""

    @abstractmethod
    def kept_tokens(self, due: Due) -> int:
        """Return the number of tokens of told text that are kept until the question."""

    def last_told(self, due: Due, tokens: int | None = None) -> list[int]:
        """Return the ids of the newest passages told, and of what is behind each: all of them, or ``tokens``."""
        found: list[list[int]] = []
        missing = tokens
        # From the newest on, so that no passage is turned into tokens that would be cut off again.
        for number in range(due.told - 1, -1, -1):
            if missing is not None and missing <= 0:
                break
            found.append(self.execution.passage(due, number))
            missing = None if missing is None else missing - len(found[-1])
        ids = [token for passage in reversed(found) for token in passage]
        return ids if tokens is None else ids[-tokens:]

    def told_tokens(self, due: Due) -> int:
        """Return the number of tokens told so far."""
        if self.execution.equal_passages:
            return due.told * len(self.execution.passage(due, 0))
        return sum(len(self.execution.passage(due, number)) for number in range(due.told))


class NoMemory(TextArm[M, W]):
    """The question only: what the decoder knows by itself (borderline). Each question is asked once."""

    name: ClassVar[str] = "none"

    def __init__(self, execution: Execution[M, W]) -> None:
        super().__init__(execution)
        self._known: dict[tuple[int, int], Answer | None] = {}

    def answers(self, moment: M, due: Sequence[Due]) -> list[Answer | None]:
        new = {(one.episode.number, one.number): one for one in due}
        new = {key: one for key, one in new.items() if key not in self._known}
        self._known.update(zip(new, super().answers(moment, list(new.values())), strict=True))
        return [self._known[one.episode.number, one.number] for one in due]

    def answers_anew(self, moment: M, due: Sequence[Due]) -> list[Answer | None]:
        return super().answers(moment, due)

    def context(self, due: Due) -> list[int]:
        return []

    def kept_tokens(self, due: Due) -> int:
        return 0


class Window(TextArm[M, W]):
    """The last ``tokens`` tokens of what was told."""

    name: ClassVar[str] = "window"

    def __init__(self, execution: Execution[M, W], tokens: int) -> None:
        super().__init__(execution)
        if tokens < 1:
            raise InputError(f"a window must have at least 1 token, got {tokens}")
        self.tokens = tokens

    def context(self, due: Due) -> list[int]:
        return self.last_told(due, self.tokens)

    def kept_tokens(self, due: Due) -> int:
        return len(self.context(due))

    def is_inside(self, due: Due) -> bool:
        """Return whether all passages that the answer needs lie in the window as a whole."""
        room = self.tokens
        for number in range(due.told - 1, min(due.question.needs, default=0) - 1, -1):
            room -= len(self.execution.passage(due, number))
            if room < 0:
                return False
        return True

    def settings(self) -> dict[str, JsonValue]:
        return {"tokens": self.tokens}


class FullContext(TextArm[M, W]):
    """Everything told so far, where that and the answer fit into ``positions``.

    Of passages of equal length, the newest that fit, if the needed ones are among them.
    """

    name: ClassVar[str] = "full-context"

    def __init__(self, execution: Execution[M, W], positions: int) -> None:
        super().__init__(execution)
        self.positions = positions

    def context(self, due: Due) -> list[int] | None:
        room = self.positions - len(self.execution.question(due)) - self.execution.answer_tokens
        if not self.execution.equal_passages:
            told = self.last_told(due)
            return told if len(told) <= room else None
        # Any number of equal passages is as long for every question, so that all can be read in one batch.
        size = len(self.execution.passage(due, 0))
        count = min(max(room // size, 0), due.told)
        return self.last_told(due, count * size) if min(due.question.needs) >= due.told - count else None

    def kept_tokens(self, due: Due) -> int:
        return self.told_tokens(due)

    def settings(self) -> dict[str, JsonValue]:
        return {"positions": self.positions}


class BM25(TextArm[M, W]):
    """Classic text retrieval over everything told, as bm25s does it (Lucene's scores).

    Args:
        execution: of the evaluation; it says what words are (English without stop words, or words of the language).
        passages: most passages put in front of the question, oldest first.
        tokens: room for them; the best come first, and one that does not fit is left out, not cut. None: no limit.
        positions: of the decoder; question, answer and passages must fit. None: no limit. Where no passage fits, the
            question is not answered.

    Raises:
        MissingDependencyError: bm25s is not installed.
    """

    name: ClassVar[str] = "bm25"

    def __init__(
        self,
        execution: Execution[M, W],
        passages: int = 4,
        tokens: int | None = None,
        positions: int | None = None,
    ) -> None:
        super().__init__(execution)
        self._bm25s = require_extra("bm25s", "arm 'bm25'")
        self.passages = passages
        self.tokens = tokens
        self.positions = positions

    def contexts(self, due: Sequence[Due]) -> list[list[int] | None]:
        found: list[list[int] | None] = []
        for _, some in groupby(due, key=lambda one: (one.episode.number, one.told)):
            together = list(some)  # of one stream at one moment: one index for all of them
            found += map(self._joined, together, self.ranked(together))
        return found

    def context(self, due: Due) -> list[int] | None:
        [found] = self.contexts([due])
        return found

    def _joined(self, due: Due, ranked: Sequence[int]) -> list[int] | None:
        """Return the ids of the best passages that fit, in the order in which they were told."""
        room = float("inf") if self.tokens is None else self.tokens
        if self.positions is not None:
            question = len(self.execution.question(due)) + self.execution.answer_tokens
            room = min(room, self.positions - question)
        chosen: dict[int, list[int]] = {}
        for place in ranked:
            ids = self.execution.passage(due, place)
            if sum(map(len, chosen.values())) + len(ids) <= room:
                chosen[place] = ids
            if len(chosen) == self.passages:
                break
        return None if not chosen else [token for place in sorted(chosen) for token in chosen[place]]

    def kept_tokens(self, due: Due) -> int:
        return self.told_tokens(due)

    def ranked(self, due: Sequence[Due]) -> list[list[int]]:
        """Return, for questions to one stream at one moment, the numbers of the told passages, best match first.

        Where passages are equally long, of as many as are taken; else of all, equals newest first.
        """
        told = due[0].told
        index = self._bm25s.BM25()
        texts = [passage.text for passage in due[0].episode.passages[:told]]
        index.index(self.execution.words(texts), show_progress=False)
        queries = self.execution.words([one.question.prompt for one in due])
        if self.execution.equal_passages:
            places, _ = index.retrieve(queries, k=min(self.passages, told), show_progress=False)
            return [[int(place) for place in row] for row in places]
        found = []
        for query in queries:
            # bm25s raises for words that it has not indexed.
            known = [word for word in query if word in index.vocab_dict]
            scores = index.get_scores(known).tolist() if known else [0.0] * told
            found.append(sorted(range(told), key=lambda place: (-scores[place], -place)))
        return found

    def settings(self) -> dict[str, JsonValue]:
        return {"passages": self.passages, "tokens": self.tokens, "method": "lucene", "k1": 1.5, "b": 0.75}
