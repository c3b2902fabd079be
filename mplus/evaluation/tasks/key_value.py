"""Key-value pairs: random identifiers are told in pairs, and the value of a key is asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

from attrs import define, field

from mplus.config import whole
from mplus.errors import InputError
from mplus.evaluation.tasks.base import Episode, FileOptions, Passage, Protocol, Question
from mplus.evaluation.tasks.contexts import holds
from mplus.evaluation.texts import read

Pair = tuple[str, str]


class KeyValue(Protocol):
    """Reads the key-value records of "Lost in the Middle" (``kv-retrieval-*_keys.jsonl[.gz]``).

    A passage is as many pairs as fit; all passages of an episode are pairs, so every distraction looks like a fact.
    """

    @define(frozen=True, kw_only=True)
    class Options(FileOptions):
        """Besides what every protocol can be told.

        Attributes:
            pair: how a pair is told; ``{key}`` and ``{value}`` stand for it.
            prompt: how it is asked; ``{key}`` stands for the key.
            characters: tell and ask only so many characters of each value; None: all.
            pairs: most pairs in a passage; None: as many as fit.
        """

        pair: str = field(default='"{key}": "{value}"', validator=[holds("{key}"), holds("{value}")])
        prompt: str = field(default='"{key}": "', validator=holds("{key}"))
        characters: int | None = field(default=None, validator=whole(1, optional=True))
        pairs: int | None = field(default=None, validator=whole(1, optional=True))

    options: Options
    name = "key-value"
    answer_tokens = 40

    @property
    def deviations(self) -> tuple[str, ...]:
        return ("not a protocol of the paper: records of 'Lost in the Middle', told in chunks instead of one prompt",)

    def episodes(self) -> list[Episode]:
        options = self.options
        records = key_value_records(options.data)
        rng = random.Random(f"{self.name}:{options.seed}")  # noqa: S311 - reproducible, not secret
        rng.shuffle(records)
        pairs = iter([pair for record in records for pair in record])
        episodes: list[Episode] = []
        while len(episodes) < options.episodes:
            packed = list(self._pack(pairs, options.before + options.passages))
            if len(packed) < options.before + options.passages:
                break  # the data is used up
            episodes.append(self._episode(len(episodes), packed, rng))
        if not episodes:
            raise InputError(
                f"{self.name}: the data must have pairs for {options.before + options.passages} passages of at most "
                f"{options.passage_tokens} tokens, its {sum(map(len, records))} are not enough: ask for fewer passages"
            )
        return episodes

    def _pack(self, pairs: Iterator[Pair], passages: int) -> Iterator[list[Pair]]:
        packed: list[Pair] = []
        for key, value in pairs:
            pair = (key, value[: self.options.characters])
            if self.texts.count(self._told([pair])) > self.options.passage_tokens:
                raise InputError(
                    f"{self.name}: a pair must fit into a passage of {self.options.passage_tokens} tokens, {key!r} "
                    "does not: raise passage_tokens, or tell fewer characters of the values"
                )
            full = len(packed) == self.options.pairs
            if packed and (full or self.texts.count(self._told([*packed, pair])) > self.options.passage_tokens):
                yield packed
                passages -= 1
                packed = []
                if not passages:
                    return
            packed.append(pair)

    def _told(self, pairs: Sequence[Pair]) -> str:
        lines = [self.options.pair.replace("{key}", key).replace("{value}", value) for key, value in pairs]
        return "\n".join(lines)

    def _episode(self, number: int, packed: Sequence[Sequence[Pair]], rng: random.Random) -> Episode:
        at = self.options.before
        count = min(self.options.questions, len(packed[at]))
        asked: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
            (key, (value,), (at,)) for key, value in rng.sample(list(packed[at]), count)
        ]
        # Never told: no key of the data, but made as those are.
        asked += [(str(UUID(int=rng.getrandbits(128))), (), ()) for _ in range(self.options.untold)]
        return Episode(
            number=number,
            passages=tuple(
                Passage(text=self._told(pairs), source="asked for" if place == at else f"distraction {place}")
                for place, pairs in enumerate(packed)
            ),
            questions=tuple(
                Question(prompt=self.options.prompt.replace("{key}", key), answers=answers, needs=needs, after=at)
                for key, answers, needs in asked
            ),
        )


def key_value_records(path: Path) -> list[list[Pair]]:
    """Return the pairs of every record. Raises InputError when the file cannot be read or a line has another format."""
    records = []
    for number, line in enumerate(read(path).splitlines(), 1):
        try:
            records.append([(str(key), str(value)) for key, value in json.loads(line)["ordered_kv_records"]])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {path} must be a record of key-value retrieval: {error!r}") from error
    return records
