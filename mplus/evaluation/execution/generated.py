"""GeneratedAnswers: texts are written into memories one chunk after the other, and each answer is generated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import attrs
import torch
from torch import Tensor

from mplus.config import JsonValue
from mplus.environment import run_info
from mplus.errors import InputError
from mplus.evaluation import require_extra
from mplus.evaluation.chat.choice import Choice, ChoiceMade, choosing
from mplus.evaluation.chat.prompt import ChatPrompt
from mplus.evaluation.execution.ann_recall import Shortcuts
from mplus.evaluation.execution.base import (
    ID_BYTES,
    Advance,
    Answer,
    Due,
    Execution,
    RowCounts,
    Signals,
    Trace,
    due_by_place,
)
from mplus.evaluation.execution.memory_arms import MemoryArms
from mplus.evaluation.execution.telling import MemoryMoment, Telling
from mplus.evaluation.generating import (
    ExportedEpisode,
    ExportedHead,
    Generated,
    Generation,
    Scoring,
    answers,
    exported,
)
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.oracle import OracleMechanism
from mplus.evaluation.reports.forgetting_curve import Curve, curves
from mplus.evaluation.reports.report import Arm
from mplus.evaluation.retriever_swap import Way, retriever_for, state_bytes
from mplus.evaluation.tasks.base import Task, tokens_by_age
from mplus.evaluation.texts import Texts, Tokenizer
from mplus.evaluation.tracing import (
    FEATURES,
    Seen,
    TracingMechanism,
    check_retrieves,
    count_rows,
    features,
    scores,
)
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.reading.override import mechanism_for_reads, reading_as
from mplus.mechanisms.base import MemoryMechanism
from mplus.memory.memory import Memory
from mplus.retrievers.base import Retriever


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
        chat: ChatPrompt | None = None,
    ) -> None:
        """Make the episodes and check that they fit the decoder.

        Args:
            model: a wrapped decoder; put into eval mode.
            tokenizer: its tokenizer.
            task: makes the episodes.
            options, generation, scoring: settings; defaults are the classes' own, with the task's number of generated
                tokens and the tokenizer's special ids.
            chat: ask as a user of a chat model does. Text then stands behind the opening of the user's turn, and what
                is told ends with the separator in memory too, so that every arm reads the same tokens.

        Raises:
            InputError: the data has nothing to tell, or a passage is too short for a chunk.
            ConfigError: settings contradict each other or the decoder.
        """
        self.options, self.scoring = options or RunOptions(), scoring or Scoring()
        self.generation = generation or Generation.of(tokenizer, tokens=task.answer_tokens)
        self.model, self.tokenizer, self.task, self.chat = model, tokenizer, task, chat
        self.asks_untold = chat is not None
        self.model.train(False)
        self.texts = Texts(tokenizer)
        chosen = self.options if self.options.ages is not None else attrs.evolve(self.options, ages=task.ages)
        self.ages = chosen.chosen_ages(task.passages)
        self.episodes = task.episodes()
        self.memory_arms = MemoryArms(model)
        self._retrievers: dict[str, Retriever | None] = {}
        self.telling = Telling(model, tokenizer, self.texts, self.options, chat is not None)
        self.telling.check(self.episodes, task.passage_tokens)

    @property
    def steps(self) -> int:
        return sum(len(episode.passages) for episode in self.episodes)

    @torch.no_grad()
    def moments(self, advance: Advance | None = None) -> Iterator[MemoryMoment]:
        streams = self.options.streams
        for start in range(0, len(self.episodes), streams):
            batch = self.episodes[start : start + streams]
            yield from self.telling.moments(batch, due_by_place(batch, self.ages), self.options.seed + start, advance)

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
        if self.chat is not None:
            return self.chat.prompt(due.question.prompt, context)
        return self.generation.prompt([*context, *self.texts.ids(due.question.prompt)], memory=memory)

    @property
    def arm_names(self) -> Sequence[str]:
        return self.memory_arms.every

    def arm_options(self, options: ArmOptions) -> ArmOptions:
        return self.memory_arms.settle(options)

    def way(self, arm: str, options: ArmOptions) -> Way | str:
        return self.memory_arms.way(arm, options)

    def read(self, moment: MemoryMoment, due: Sequence[Due], way: Way) -> list[Answer]:
        found: list[Answer] = []
        for part, streams in self._parts(moment, due):
            seen: list[Choice] = []
            # Of a chat model the right chunks are read alone, as the ceiling reads the right text.
            wanted, others = [one.sources() for one in part], self.chat is None
            oracle = partial(OracleMechanism, wanted=wanted, others=others) if way.oracle else None
            with (
                reading_as(self.model, retriever=way.retriever, retrieved_tokens=way.retrieved_tokens, around=oracle),
                choosing(self.model, seen),
            ):
                read = self._read(part, streams, way)
            # A memory of text says itself what it chose, and notes nothing here.
            choices: Sequence[Choice | None] = seen or [one.choice for one in read]
            found += [attrs.evolve(one, choice=choice) for one, choice in zip(read, choices, strict=True)]
        return found

    def choose(self, moment: MemoryMoment, due: Sequence[Due]) -> list[Choice]:
        """Return the chunks that reads of these questions bring back, of a mechanism that chooses for a whole text."""
        found: list[Choice] = []
        for part, streams in self._parts(moment, due):
            seen: list[Choice] = []
            prompts = [self._prompt(one, memory=True) for one in part]
            with choosing(self.model, seen, only=True), suppress(ChoiceMade):
                answers(self.model, self.tokenizer, prompts, attrs.evolve(self.generation, tokens=1), streams)
            found += seen or [Choice()] * len(part)
        return found

    @contextmanager
    def one_token(self) -> Iterator[int]:
        before, self.generation = self.generation, attrs.evolve(self.generation, tokens=1, batch=1)
        try:
            yield self.options.timed
        finally:
            self.generation = before

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
            own = mechanism.attended_rows(view) if self._of_rows else made[row].recalled_tokens
            attended = None if own is None else own + len(prompt)
            answer = self.judged(due[row], made[row].text, state_bytes(streams, row, way), attended, made[row])
            found.append(attrs.evolve(answer, choice=made[row].choice))
        return found

    def answer(self, due: Sequence[Due], contexts: Sequence[Sequence[int]], kept: Sequence[int]) -> list[Answer]:
        prompts = [self._prompt(one, False, context) for one, context in zip(due, contexts, strict=True)]
        made = answers(self.model, self.tokenizer, prompts, self.generation)
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
        return Answer(self.scoring.is_correct(text, accepted), state_bytes, attended, scores_, generated=generated)

    def exported(self) -> tuple[ExportedHead, list[ExportedEpisode]]:
        """Return the lines of the file of questions."""
        return exported(self.episodes, self.ages, self.generation, self.options.separator, self.chat)

    def export_questions(self) -> None:
        if self.options.export is not None:
            head, episodes = self.exported()
            lines = "".join(json.dumps(line) + "\n" for line in (head, *episodes))
            self.options.export.write_text(lines, encoding="utf-8")

    def export_answers(self, arm: str, answered: Sequence[tuple[Due, Answer]]) -> None:
        if self.options.answers is None:
            return
        config = self.model.mplus_config
        memory = {"mechanism": config.mechanism.name, "retriever": config.retriever.name}
        with self.options.answers.open("a", encoding="utf-8") as file:
            for due, answer in answered:
                file.write(json.dumps({"arm": arm, **memory, **self._answered(due, answer)}, ensure_ascii=False) + "\n")

    def _answered(self, due: Due, answer: Answer) -> dict[str, JsonValue]:
        """Return a question with its answer as plain data."""
        question, choice, made = due.question, answer.choice, answer.generated
        needed = [due.episode.passages[need] for need in question.needs]
        texts = {passage.source: passage.text for passage in due.episode.passages}
        read = None if choice is None else [{"source": one, "text": texts.get(one or "")} for one in choice.sources]
        return {
            "id": due.id,
            "category": question.category,
            "question": question.prompt,
            "accepted": list(question.answers),
            "correct": answer.correct,
            "answer": None if made is None else made.text,
            "likelihood": None if made is None else made.known_likelihood,
            "needed": [{"source": passage.source, "text": passage.text} for passage in needed],
            "read": read,
            "score": None if choice is None else choice.score,
        }

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
                for layer, one_layer in sorted(seen.items()):  # all: something was told before anything is asked
                    rows = count_rows(layer, one_layer, row, one.sources())
                    counts[layer].append(rows.columns())
                    if shortcuts is not None and rows.stored:
                        views = dict.fromkeys(shortcuts.retrievers, one_layer.searched(layer, row))
                        look = slice(row, row + 1)
                        shortcuts.ask(layer, one_layer.hidden[look], one_layer.mask[look], views)
                    if spread and engine.mechanism.key_size and rows.stored > 1:
                        every = scores(engine, layer, one_layer, row, short_term=False)
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
        if not least:
            return None  # whatever it answers is what a window is worth
        if not right:
            return f"no answer lies inside its {tokens} tokens as a whole, so nothing shows that it can read"
        share = sum(right) / len(right)
        return (
            None if share >= least else f"{share:.2f} of {len(right)} questions inside it, at least {least} are needed"
        )

    def curves(self, arms: Sequence[Arm], borderline: float | None) -> tuple[Curve, ...]:
        if self.memory_arms.own is not None:
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
        del harness["answers"]  # a file besides the report, which changes nothing
        harness["directory"] = self.options.directory is not None  # where it lies means nothing elsewhere
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
