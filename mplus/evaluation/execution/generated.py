"""GeneratedAnswers: texts are written into memories one chunk after the other, and each answer is generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import attrs
import torch
from attrs import define
from torch import Tensor

from mplus.config import JsonValue
from mplus.environment import run_info
from mplus.errors import ConfigError, InputError, NotSupported
from mplus.evaluation import require_extra
from mplus.evaluation.execution.ann_recall import Shortcuts
from mplus.evaluation.execution.base import (
    ID_BYTES,
    Advance,
    Answer,
    Due,
    Execution,
    Moment,
    RowCounts,
    Signals,
    Trace,
    due_by_place,
)
from mplus.evaluation.generating import (
    ExportedEpisode,
    ExportedHead,
    Generated,
    Generation,
    Scoring,
    answers,
    export,
    exported,
)
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.oracle import OracleMechanism, retrieves
from mplus.evaluation.reports.forgetting_curve import Curve, curves
from mplus.evaluation.reports.report import ARMS, Arm
from mplus.evaluation.retriever_swap import Way, find_way, retriever_for, state_bytes
from mplus.evaluation.tasks.base import Task, tokens_by_age
from mplus.evaluation.texts import Texts, Tokenizer
from mplus.evaluation.tracing import FEATURES, Seen, TracingMechanism, check_retrieves, count_rows, features, scores
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.reading.override import mechanism_for_reads, reading_as
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.short_term.batched_streams import BATCHED
from mplus.memory.memory import Memory
from mplus.retrievers.base import Retriever

WITHOUT_MEMORY = ("none", "window", "full-context", "snapkv", "bm25")
"""Arms that run the decoder alone."""


@define(eq=False)
class MemoryMoment(Moment):
    """Questions to several streams.

    Attributes:
        memory: all streams as they are now; read only.
    """

    memory: Memory


class GeneratedAnswers(Execution[MemoryMoment, Way]):
    """Any task on any wrapped decoder, a batch of streams at a time, through ``Memory`` and ``generate``.

    Example:
        >>> execution = GeneratedAnswers(model, tokenizer, task, options=RunOptions(ages=(0, 8)))  # doctest: +SKIP
        >>> retention(execution).save("report.json")  # doctest: +SKIP
    """

    features = FEATURES
    own_retriever = "own"

    def __init__(
        self,
        model: MemoryModel,
        tokenizer: Tokenizer,
        task: Task,
        *,
        options: RunOptions | None = None,
        generation: Generation | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        """Make the episodes and check that they fit the decoder.

        Args:
            model: a wrapped decoder; put into eval mode.
            tokenizer: its tokenizer.
            task: makes the episodes.
            options, generation, scoring: settings; defaults are the classes' own, with the task's number of generated
                tokens and the tokenizer's special ids.

        Raises:
            InputError: the data has nothing to tell, or a passage is too short for a chunk.
            ConfigError: settings contradict each other or the decoder.
        """
        self.options, self.scoring = options or RunOptions(), scoring or Scoring()
        self.generation = generation or Generation.of(tokenizer, tokens=task.answer_tokens)
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.model.train(False)
        self.texts = Texts(tokenizer)
        chosen = self.options if self.options.ages is not None else attrs.evolve(self.options, ages=task.ages)
        self.ages = chosen.chosen_ages(task.passages)
        self.episodes = task.episodes()
        self._retrievers: dict[str, Retriever | None] = {}
        self._check_chunks()

    def _check_chunks(self) -> None:
        """Raise ConfigError or InputError unless every passage is one chunk, or ages in chunks would mean nothing."""
        config = self.model.mplus_config
        if self.task.passage_tokens > config.chunk_tokens:
            raise ConfigError(
                f"passage_tokens must not exceed the decoder's chunk_tokens ({config.chunk_tokens}), got "
                f"{self.task.passage_tokens}: a passage is written as one chunk"
            )
        for episode in self.episodes:
            for passage in episode.passages:
                count = self.texts.count(passage.text)
                if count < config.min_chunk_tokens:
                    raise InputError(
                        f"a passage must have at least the decoder's min_chunk_tokens ({config.min_chunk_tokens}), "
                        f"{passage.source!r} of episode {episode.number} has {count}: raise passage_tokens, or take "
                        "other data"
                    )

    @property
    def steps(self) -> int:
        return sum(len(episode.passages) for episode in self.episodes)

    @torch.no_grad()
    def moments(self, advance: Advance | None = None) -> Iterator[MemoryMoment]:
        streams = self.options.streams
        for start in range(0, len(self.episodes), streams):
            batch = self.episodes[start : start + streams]
            memory = self._new_memory(len(batch), self.options.seed + start)
            due = due_by_place(batch, self.ages)
            for place in range(max(len(episode.passages) for episode in batch)):
                present = [episode.passages[place] if place < len(episode.passages) else None for episode in batch]
                ids = [None if passage is None else self.texts.ids(passage.text) for passage in present]
                sources = [None if passage is None else passage.source for passage in present]
                memory.write(ids, source=sources, progress=False)
                if place in due:
                    yield MemoryMoment(due[place], memory)
                if advance is not None:
                    advance(sum(passage is not None for passage in present))

    def _new_memory(self, streams: int, seed: int) -> Memory:
        # A memory of text turns what it recalls into tokens, and what it is told into text.
        tokenizer = None if self._of_rows else cast("Any", self.tokenizer)
        return self.model.new_memory(batch_size=streams, seed=seed, tokenizer=tokenizer)

    @property
    def _of_rows(self) -> bool:
        """Return whether memories of the decoder are made of rows, not of text."""
        return isinstance(self.model.mplus_engine.mechanism, MemoryMechanism)

    @property
    def answer_tokens(self) -> int:
        return self.generation.tokens

    def passage(self, due: Due, number: int) -> list[int]:
        return self.texts.ids(due.episode.passages[number].text + self.options.separator)

    def question(self, due: Due) -> list[int]:
        return self._prompt(due, memory=False)

    def words(self, texts: Sequence[str]) -> list[list[str]]:
        bm25s = require_extra("bm25s", "arm 'bm25'")
        found: list[list[str]] = bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
        return found

    def _prompt(self, due: Due, memory: bool, context: Sequence[int] = ()) -> list[int]:
        return self.generation.prompt([*context, *self.texts.ids(due.question.prompt)], memory=memory)

    @property
    def arm_names(self) -> Sequence[str]:
        return ARMS if self._own is None else (*ARMS, *self._own_arms)

    @property
    def _own(self) -> str | None:
        """Return the name of a mechanism that is an arm of its own; None for M+ and MemoryLLM."""
        name = self.model.mplus_config.mechanism.name
        return None if name in BATCHED else str(name)

    @property
    def _own_arms(self) -> tuple[str, ...]:
        """Return the names of the arms that read memory by such a mechanism."""
        name, mechanism = str(self._own), self.model.mplus_engine.mechanism
        return (name, f"{name}-oracle") if retrieves(mechanism) else (name,)

    def arm_options(self, options: ArmOptions) -> ArmOptions:
        config, passages = self.model.mplus_config, options.bm25_passages or 4
        if self._own is None:
            window = options.window_tokens or 1 + config.retrieved_tokens + config.short_term_tokens
            return attrs.evolve(options, window_tokens=window, bm25_passages=passages)
        if self._own in ARMS:
            raise NotSupported(
                f"the mechanism {self._own!r} has the name of an arm that there is for every decoder, so it cannot be "
                "measured beside it: register it under another name"
            )
        usable = (*WITHOUT_MEMORY, *self._own_arms)
        wanted = usable if options.arms is None else options.arms
        reading = [name for name in wanted if name in ARMS and name not in WITHOUT_MEMORY]
        if reading:
            raise NotSupported(
                f"the arms {', '.join(reading)} measure the mechanisms {' and '.join(map(repr, BATCHED))}, and the "
                f"decoder's mechanism is {self._own!r}: none of them would measure it under its own name. Ask for "
                f"some of the arms {', '.join(usable)}"
            )
        retrieved = config.retrieved_tokens if retrieves(self.model.mplus_engine.mechanism) else 0
        window = options.window_tokens or max(retrieved + (config.short_term_tokens or 0), config.chunk_tokens)
        return attrs.evolve(options, arms=wanted, window_tokens=window, bm25_passages=passages)

    def way(self, arm: str, options: ArmOptions) -> Way | str:
        if self._own is not None:
            return Way(oracle=arm != self._own)
        return find_way(self.model, arm, options)

    def read(self, moment: MemoryMoment, due: Sequence[Due], way: Way) -> list[Answer]:
        found: list[Answer] = []
        for part, streams in self._parts(moment, due):
            oracle = partial(OracleMechanism, wanted=[one.sources() for one in part]) if way.oracle else None
            with reading_as(self.model, retriever=way.retriever, retrieved_tokens=way.retrieved_tokens, around=oracle):
                found += self._read(part, streams, way)
        return found

    def _parts(self, moment: MemoryMoment, due: Sequence[Due]) -> Iterator[tuple[Sequence[Due], Memory]]:
        """Yield as many questions as are answered at a time, each with the memory of its stream."""
        for start in range(0, len(due), self.generation.batch):
            part = due[start : start + self.generation.batch]
            yield part, moment.memory.select([one.row for one in part])

    def _read(self, due: Sequence[Due], streams: Memory, way: Way) -> list[Answer]:
        mechanism = mechanism_for_reads(self.model.mplus_engine)
        prompts = [self._prompt(one, memory=True) for one in due]
        made = answers(self.model, self.tokenizer, prompts, self.generation, streams)
        found = []
        for row, (view, prompt) in enumerate(zip(streams.snapshot(), prompts, strict=True)):
            attended = mechanism.prefix_rows(view) + len(prompt) if self._of_rows else None
            found.append(self.judged(due[row], made[row].text, state_bytes(streams, row, way), attended, made[row]))
        return found

    def answer(self, due: Sequence[Due], contexts: Sequence[Sequence[int]], kept: Sequence[int]) -> list[Answer]:
        prompts = [self._prompt(one, False, context) for one, context in zip(due, contexts, strict=True)]
        made = answers(self.model, self.tokenizer, prompts, self.generation) if prompts else []
        return [
            self.judged(one, answer.text, ID_BYTES * count, len(prompt), answer)
            for one, answer, count, prompt in zip(due, made, kept, prompts, strict=True)
        ]

    def judged(
        self, due: Due, text: str, state_bytes: int | None, attended: int | None, generated: Generated | None = None
    ) -> Answer:
        """Return the answer that a text is: before stop strings are looked for."""
        accepted = due.question.answers
        scores_ = self.scoring.scores(text, accepted)
        return Answer(self.scoring.is_correct(text, accepted), state_bytes, attended, scores_, generated)

    def exported(self) -> tuple[ExportedHead, list[ExportedEpisode]]:
        """Return the lines of the file of questions."""
        return exported(self.episodes, self.ages, self.generation, self.options.separator)

    def export_questions(self) -> None:
        if self.options.export is not None:
            export(self.options.export, *self.exported())

    def retriever_ways(self, retrievers: Mapping[str, Retriever] | None) -> dict[str, Retriever | None]:
        check_retrieves(self.model)
        mechanism = self.model.mplus_engine.mechanism
        if retrievers is None:
            retrievers = {"random": retriever_for(self.model, "random")} if mechanism.uses_retriever else {}
        self._retrievers = {self.own_retriever: mechanism.retriever, **retrievers}
        return self._retrievers

    def spread_tokens(self, tried: Sequence[int]) -> int:
        return max(tried)

    def traced(
        self, moment: MemoryMoment, due: Sequence[Due], name: str, k: int, shortcuts: Shortcuts | None, spread: bool
    ) -> Trace:
        engine, correct = self.model.mplus_engine, []
        layers = range(engine.layout.layers)
        counts: list[list[Tensor]] = [[] for _ in layers]
        spreads: list[list[float]] = [[] for _ in layers]
        for part, streams in self._parts(moment, due):
            seen: dict[int, Seen] = {}
            tracing = partial(TracingMechanism, seen=seen)
            prompts = [self._prompt(one, memory=True) for one in part]
            with reading_as(self.model, retriever=self._retrievers[name], retrieved_tokens=k, around=tracing):
                made = answers(self.model, self.tokenizer, prompts, self.generation, streams)
            for row, (one, answer) in enumerate(zip(part, made, strict=True)):
                correct.append(self.scoring.is_correct(answer.text, one.question.answers))
                for layer in sorted(seen):  # all of them: something was told before anything is asked
                    rows = count_rows(layer, seen[layer], row, one.sources())
                    counts[layer].append(rows.columns())
                    if shortcuts is not None and rows.stored:
                        views = dict.fromkeys(shortcuts.retrievers, seen[layer].searched(layer, row))
                        look = slice(row, row + 1)
                        shortcuts.ask(layer, seen[layer].hidden[look], seen[layer].mask[look], views)
                    if spread and engine.mechanism.key_size and rows.stored > 1:
                        every = scores(engine, layer, seen[layer], row, short_term=False)
                        spreads[layer].append(float(every.std(correction=0)))
        found = [RowCounts(*torch.stack(columns, 1)) for columns in counts if columns]
        return Trace(found, torch.tensor(correct, dtype=torch.bool), spreads)

    def signals(self) -> Iterator[Signals]:
        if not self.task.untold or len(self.episodes) < 2:
            raise InputError(
                "abstention needs untold questions, and two episodes to calibrate on one and judge the other, "
                f"got untold = {int(self.task.untold)} and {len(self.episodes)} episodes"
            )
        for moment in self.moments():
            found = [
                features(
                    self.model,
                    self.tokenizer,
                    [self._prompt(one, memory=True) for one in part],
                    streams,
                    self.generation,
                )
                for part, streams in self._parts(moment, moment.due)
            ]
            yield Signals(
                torch.cat(found),
                torch.tensor([one.question.told for one in moment.due]),
                torch.tensor([one.episode.number % 2 == 0 for one in moment.due]),
            )

    def run_info(self, name: str | None, **seeds: int) -> dict[str, JsonValue]:
        return run_info(model=name, seeds={"protocol": self.task.seed, "memory": self.options.seed, **seeds})

    def age_tokens(self) -> dict[int, float]:
        return tokens_by_age(self.episodes, self.ages, self.texts)

    def window_flaw(self, inside: Mapping[int, Sequence[bool]], tokens: int, least: float) -> str | None:
        right = [correct for some in inside.values() for correct in some]
        if not right:
            return f"no answer lies inside its {tokens} tokens as a whole, so nothing shows that it can read"
        share = sum(right) / len(right)
        return (
            None if share >= least else f"{share:.2f} of {len(right)} questions inside it, at least {least} are needed"
        )

    def curves(self, arms: Sequence[Arm], borderline: float | None) -> tuple[Curve, ...]:
        if self._own is not None:
            return ()  # they are those of a short-term memory from which rows are dropped at random
        config = self.model.mplus_config
        best = next((arm.cells[0].accuracy for arm in arms if arm.name == "memoryllm" and arm.cells), 1.0)
        guess = borderline if borderline is not None else self.task.chance or 0.0
        if config.short_term_tokens is None:  # nothing is dropped at random, so no law of it
            return ()
        sizes = config.memory_tokens_per_chunk, config.short_term_tokens
        return curves(self.ages, *sizes, chance=guess, ceiling=max(best, guess))

    def settings(self, options: ArmOptions, arms: Mapping[str, dict[str, JsonValue]]) -> dict[str, JsonValue]:
        harness = attrs.asdict(self.options)
        harness.update(ages=self.ages, export=None if self.options.export is None else self.options.export.name)
        return {
            "protocol": self.task.settings(),
            "episodes": len(self.episodes),
            "scoring": attrs.asdict(self.scoring),
            "generation": {"decoding": "greedy", **attrs.asdict(self.generation)},
            "harness": harness,
            "arms": {"window_converged": options.window_converged, **arms},
            "memory": self.model.mplus_config.to_dict(),
        }

    def plain(self, kind: str, found: Mapping[str, JsonValue], name: str | None) -> dict[str, JsonValue]:
        more: dict[str, dict[str, JsonValue]] = {
            "retriever": {"scoring": attrs.asdict(self.scoring)},
            "abstention": {"calibrated_on": "episodes with even numbers"},
        }
        return {
            "format": 1,
            "kind": kind,
            "protocol": self.task.name,
            **found,
            "settings": {
                "protocol": self.task.settings(),
                "ages": list(self.ages),
                "generation": attrs.asdict(self.generation),
                **more[kind],
                "memory": self.model.mplus_config.to_dict(),
            },
            "deviations": list(self.task.deviations),
            "circumstances": self.run_info(name),
        }
