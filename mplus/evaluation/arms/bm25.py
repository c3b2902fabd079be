"""BM25: the told passages whose words match the question best, as text in front of it."""

from __future__ import annotations

from typing import Any, ClassVar

from mplus.evaluation.arms.base import Bench, Due
from mplus.evaluation.arms.text import PromptArm
from mplus.evaluation.extras import need


class BM25(PromptArm):
    """Classic text retrieval over everything told, as bm25s does it (Lucene's scores, English stop words).

    Args:
        bench: what all arms share.
        passages: most passages put in front of the question, oldest first.
        tokens: room for them; the best come first, and one that does not fit is left out, not cut. None: no limit.
        positions: of the decoder; question, answer and passages must fit. None: no limit. Where no passage fits, the
            question is not answered.

    Raises:
        MissingDependencyError: bm25s is not installed.
    """

    name: ClassVar[str] = "bm25"

    def __init__(
        self, bench: Bench, passages: int = 4, tokens: int | None = None, positions: int | None = None
    ) -> None:
        super().__init__(bench)
        self._bm25s: Any = need("bm25s", "arm 'bm25'")
        self.passages = passages
        self.tokens = tokens
        self.positions = positions

    def context(self, due: Due) -> list[int] | None:
        room = self._room(due)
        ids = {
            place: self.bench.texts.ids(due.episode.passages[place].text + self.bench.separator)
            for place in self.ranked(due)
        }
        chosen: list[int] = []
        for place, tokens in ids.items():
            used = sum(len(ids[other]) for other in chosen)
            if len(chosen) < self.passages and used + len(tokens) <= room:
                chosen.append(place)
        return None if not chosen else [token for place in sorted(chosen) for token in ids[place]]

    def _room(self, due: Due) -> float:
        room = float("inf") if self.tokens is None else self.tokens
        if self.positions is not None:
            question = self.bench.generation.prompt(self.bench.texts.ids(due.question.prompt), memory=False)
            room = min(room, self.positions - len(question) - self.bench.generation.tokens)
        return room

    def kept_tokens(self, due: Due) -> int:
        return len(self.told(due))

    def ranked(self, due: Due) -> list[int]:
        """Numbers of the told passages, best match first, among equals the newer one."""
        told = [passage.text for passage in due.episode.passages[: due.told]]
        index = self._bm25s.BM25()
        index.index(self._words(told), show_progress=False)
        [query] = self._words([due.question.prompt])
        known = [word for word in query if word in index.vocab_dict]
        scores = index.get_scores(known).tolist() if known else [0.0] * len(told)
        return sorted(range(len(told)), key=lambda place: (-scores[place], -place))

    def settings(self) -> dict[str, Any]:
        return {"passages": self.passages, "tokens": self.tokens, "method": "lucene", "k1": 1.5, "b": 0.75}

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)  # type: ignore[no-any-return]
