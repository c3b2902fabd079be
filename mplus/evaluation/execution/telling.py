"""Telling: episodes are written into memories one passage after the other, and questions become due."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from attrs import define

from mplus.errors import ConfigError, InputError
from mplus.evaluation.execution.base import Advance, Due, Moment
from mplus.evaluation.options import RunOptions
from mplus.evaluation.tasks.base import Episode, Passage
from mplus.evaluation.texts import Texts, Tokenizer
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.base import MemoryMechanism
from mplus.memory.memory import Memory


@define(eq=False)
class MemoryMoment(Moment):
    """Questions to several streams.

    Attributes:
        memory: all streams as they are now; read only.
    """

    memory: Memory


@define(frozen=True, eq=False)
class Telling:
    """Writes episodes into memories of one decoder.

    Attributes:
        model: the decoder.
        tokenizer: its tokenizer.
        texts: turns passages into its ids.
        options: of the run: the separator between passages, and the folder of memories on disk.
        chat: passages are written as text, each with the separator at its end, as somebody writes line after line;
            else as ids of one chunk each.
    """

    model: MemoryModel
    tokenizer: Tokenizer
    texts: Texts
    options: RunOptions
    chat: bool

    def check(self, episodes: Sequence[Episode], passage_tokens: int) -> None:
        """Raise ConfigError or InputError unless every passage is one chunk, or ages in chunks would mean nothing.

        Text of a chat model is cut into chunks by its mechanism, and ages are those in passages.
        """
        config = self.model.mplus_config
        if self.chat:
            return
        if passage_tokens > config.chunk_tokens:
            raise ConfigError(
                f"passage_tokens must not exceed the decoder's chunk_tokens ({config.chunk_tokens}), got "
                f"{passage_tokens}: a passage is written as one chunk"
            )
        for episode in episodes:
            for passage in episode.passages:
                count = self.texts.count(passage.text)
                if count < config.min_chunk_tokens:
                    raise InputError(
                        f"a passage must have at least the decoder's min_chunk_tokens ({config.min_chunk_tokens}), "
                        f"{passage.source!r} of episode {episode.number} has {count}: raise passage_tokens, or take "
                        "other data"
                    )

    def moments(
        self, batch: Sequence[Episode], due: Mapping[int, Sequence[Due]], seed: int, advance: Advance | None
    ) -> Iterator[MemoryMoment]:
        """Tell episodes to the streams of one memory; yield the questions that are due, with the memory as it is then.

        Args:
            batch: the episodes.
            due: by the number of the passage told last, what is asked then.
            seed: of the memory.
            advance: moves a progress bar on, a step for each passage.
        """
        folder = self._folder(batch, seed)
        memory = self._new_memory(len(batch), seed, folder)
        for place in range(max(len(episode.passages) for episode in batch)):
            present = [episode.passages[place] if place < len(episode.passages) else None for episode in batch]
            sources = [None if passage is None else passage.source for passage in present]
            texts = [self._written(passage) for passage in present]
            # Under an id, a memory on disk that has the passage already is left as it is.
            write_id = None if folder is None else f"passage {place}"
            memory.write(texts, source=sources, write_id=write_id, progress=False)
            if place in due:
                memory = self._reopened(memory, seed, folder)
                yield MemoryMoment(due[place], memory)
            if advance is not None:
                advance(sum(passage is not None for passage in present))
        if folder is not None:
            memory.close()

    def _written(self, passage: Passage | None) -> list[int] | str | None:
        if passage is None:
            return None
        return passage.text + self.options.separator if self.chat else self.texts.ids(passage.text)

    def _folder(self, batch: Sequence[Episode], seed: int) -> Path | None:
        """Return the folder of a memory of these episodes, which memories of other texts or configs do not share."""
        if self.options.directory is None:
            return None
        told = [[(passage.text, passage.source) for passage in episode.passages] for episode in batch]
        parts = [self.model.mplus_config.to_dict(), self.options.separator, self.chat, seed, told]
        name = hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:12]
        return self.options.directory / f"memory-{name}"

    def _new_memory(self, streams: int, seed: int, folder: Path | None) -> Memory:
        # A memory of text turns what it recalls into tokens, and what it is told into text; one of a chat model is
        # told text.
        of_rows = isinstance(self.model.mplus_engine.mechanism, MemoryMechanism)
        tokenizer = None if of_rows and not self.chat else cast("Any", self.tokenizer)
        if folder is None:
            return self.model.new_memory(batch_size=streams, seed=seed, tokenizer=tokenizer)
        return Memory.open(folder, self.model, batch_size=streams, tokenizer=tokenizer, seed=seed)

    def _reopened(self, memory: Memory, seed: int, folder: Path | None) -> Memory:
        """Return the memory as a later process finds it; itself, where it is not on disk."""
        if folder is None:
            return memory
        with closing(memory):
            streams = memory.batch_size
        return self._new_memory(streams, seed, folder)
