"""Execution: how a decoder is told what a task tells, and how its answers come about.

The experiments (retention, retriever health, abstention) and the arms know this interface only. There are two:
``GeneratedAnswers`` writes texts into memories and generates each answer; ``ParallelStreams`` holds many streams of
facts as dense tensors and answers all their questions in one pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Generic, TypeVar

from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue
from mplus.evaluation.chat.choice import Choice
from mplus.evaluation.execution.ann_recall import Shortcuts
from mplus.evaluation.generating import Generated
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports.forgetting_curve import Curve
from mplus.evaluation.reports.report import Arm
from mplus.evaluation.tasks.base import Episode, Question, Task
from mplus.hf.model.model_class import MemoryModel
from mplus.retrievers.base import Retriever

Advance = Callable[[int], None]
"""Moves a progress bar on."""

ID_BYTES = 8
"""Bytes of a token id that is kept as text."""


@define(frozen=True, eq=False)
class Due:
    """A question that is asked now.

    Attributes:
        row: the batch row of its stream.
        number: of the question in its episode.
        age: passages told since the one that age is counted from.
    """

    episode: Episode
    row: int
    number: int
    age: int

    @property
    def question(self) -> Question:
        """Return the question."""
        return self.episode.questions[self.number]

    @property
    def told(self) -> int:
        """Return the number of passages told so far."""
        return self.question.after + self.age + 1

    @property
    def id(self) -> str:
        """Return ``episode-question-age``, unique in a run."""
        return f"{self.episode.number}-{self.number}-{self.age}"

    def sources(self) -> set[str]:
        """Return the names of the passages that hold the answer."""
        return {self.episode.passages[need].source for need in self.question.needs}


@define(eq=False)
class Moment:
    """Questions that are due together, some passages having been told. Each execution adds the memory as it is now.

    Attributes:
        due: the questions.
    """

    due: Sequence[Due]


@define(frozen=True, eq=False)
class Answer:
    """One answer.

    Attributes:
        correct: whether it counts.
        state_bytes: bytes kept between telling and asking; None: not measured.
        tokens_attended: rows and tokens in sight of the first token of the answer; None: not measured.
        scores: further scores, by name.
        choice: what was brought back; None: nothing is by this arm, or it was not noted.
        generated: the details; None where it was not generated here.
    """

    correct: bool
    state_bytes: int | None
    tokens_attended: int | None
    scores: Mapping[str, float] = field(factory=dict)
    choice: Choice | None = None
    generated: Generated | None = None


@define(frozen=True, eq=False)
class RowCounts:
    """Rows in one layer, of n questions: ``[n]`` int64 each.

    Attributes:
        useful, useful_retrieved: long-term rows that the answer is in, and those of them that came back.
        useful_short_term: rows that the answer is in and that every read sees.
        stored, retrieved: all long-term rows, and those that came back; None: not counted.
    """

    useful: Tensor
    useful_retrieved: Tensor
    useful_short_term: Tensor
    stored: Tensor | None = None
    retrieved: Tensor | None = None


@define(frozen=True, eq=False)
class Trace:
    """Rows that reads of n questions retrieved, and whether the answers were right.

    Attributes:
        layers: rows, by layer.
        correct: ``[n]`` bool.
        spread: by layer, standard deviations of the retriever's scores over the long-term rows; empty: not asked for.
    """

    layers: Sequence[RowCounts]
    correct: Tensor
    spread: Sequence[Sequence[float]] = ()


@define(frozen=True, eq=False)
class Signals:
    """Signs of whether the answers to some questions are in memory.

    Attributes:
        features: ``[n, len(Execution.features)]`` float32; NaN in columns that this decoder cannot tell.
        told: ``[n]`` bool, the answer was told.
        calibrates: ``[n]`` bool: used to calibrate, not judged.
        said_unknown: ``[n]`` bool, the decoder says of itself that it does not know; None: it has no word for that.
    """

    features: Tensor
    told: Tensor
    calibrates: Tensor
    said_unknown: Tensor | None = None


def due_by_place(episodes: Sequence[Episode], ages: Sequence[int]) -> dict[int, list[Due]]:
    """Return, by the number of the passage told last, what is asked then: stream after stream, question after question.

    Questions about what was never told are due at the same ages, counted from the same passage.
    """
    found: dict[int, list[Due]] = {}
    for row, episode in enumerate(episodes):
        for number, question in enumerate(episode.questions):
            for age in ages if question.ages is None else question.ages:
                if question.after + age < len(episode.passages):
                    found.setdefault(question.after + age, []).append(Due(episode, row, number, age))
    return found


M = TypeVar("M", bound=Moment)
W = TypeVar("W")


class Execution(ABC, Generic[M, W]):
    """One decoder and one task, told and asked in one manner. ``M``: its moments; ``W``: its ways of reading memory.

    Attributes:
        features: names of the signs that ``signals`` gives.
        own_retriever: the name of the decoder's own retriever in reports.
        unavailable: arms that cannot run here, each with the reason.
        moment_limits: arms that are slow here, each with how many moments they are asked at.
        accuracy_digits: decimals of accuracies in reports of retriever health; None: all.
        equal_passages: all passages have equally many tokens. The arm full-context then reads the newest of them alone
            where that is enough, and BM25 ranks no more of them than it takes.
        asks_untold: arms are also asked for what was never told, to see whether that can be told from their answers.
        model: the wrapped decoder, in eval mode.
        task: what is told and asked.
        ages: the ages asked at, ascending.
    """

    features: ClassVar[tuple[str, ...]]
    own_retriever: ClassVar[str]
    unavailable: Mapping[str, str] = {}
    moment_limits: ClassVar[Mapping[str, int]] = {}
    accuracy_digits: ClassVar[int | None] = 4
    equal_passages: ClassVar[bool] = False
    asks_untold: bool = False
    model: MemoryModel
    task: Task
    ages: tuple[int, ...]

    # What is told, and what of it text arms read.

    @property
    @abstractmethod
    def steps(self) -> int:
        """Return the number of times that ``moments`` advances the progress."""

    @abstractmethod
    def moments(self, advance: Advance | None = None) -> Iterator[M]:
        """Tell all episodes; yield the questions that are due, with the memory as it is then."""

    @property
    @abstractmethod
    def answer_tokens(self) -> int:
        """Return the most tokens that an answer may have."""

    @abstractmethod
    def passage(self, due: Due, number: int) -> list[int]:
        """Return the ids of a passage of the question's episode, and of what separates it from the next."""

    @abstractmethod
    def question(self, due: Due) -> list[int]:
        """Return the ids that the decoder is given where it reads no memory and nothing in front of the question."""

    @abstractmethod
    def words(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the words of each text by which texts are compared (BM25)."""

    # Arms.

    @property
    @abstractmethod
    def arm_names(self) -> Sequence[str]:
        """Return the names of all arms there are."""

    @abstractmethod
    def arm_options(self, options: ArmOptions) -> ArmOptions:
        """Return ``options`` with a window and a number of passages for BM25. Raises NotSupported."""

    @abstractmethod
    def way(self, arm: str, options: ArmOptions) -> W | str:
        """Return the way of reading memory of one arm, or the reason why there is none."""

    @abstractmethod
    def read(self, moment: M, due: Sequence[Due], way: W) -> list[Answer]:
        """Answer questions by reading memory."""

    @abstractmethod
    def answer(self, due: Sequence[Due], contexts: Sequence[Sequence[int]], kept: Sequence[int]) -> list[Answer]:
        """Answer questions by the decoder alone.

        Args:
            due: the questions.
            contexts: for each, ids in front of it.
            kept: for each, how many ids have to be kept until the question.
        """

    @contextmanager
    def one_token(self) -> Iterator[int]:
        """Let answers have one token in the ``with`` block, to time them; yields how many questions are timed."""
        yield 0

    def export_questions(self) -> None:
        """Write the questions to a file, if that was asked for."""

    def export_answers(self, arm: str, answered: Sequence[tuple[Due, Answer]]) -> None:
        """Write what an arm answered to a file, if that was asked for."""

    # What the retriever does.

    @abstractmethod
    def retriever_ways(self, retrievers: Mapping[str, Retriever] | None) -> dict[str, Retriever | None]:
        """Return the retrievers that retriever health compares, by name, the decoder's own first.

        None stands for chance, or where a decoder has no retriever for the choice of its mechanism.

        Raises:
            NotSupported: reads bring nothing back.
        """

    @abstractmethod
    def spread_tokens(self, tried: Sequence[int]) -> int:
        """Return the K0 at which to look at the spread of scores, where reads of ``tried`` rows are traced."""

    @abstractmethod
    def traced(
        self, moment: M, due: Sequence[Due], name: str, k: int, shortcuts: Shortcuts | None, spread: bool
    ) -> Trace:
        """Answer questions by reading ``k`` rows that a retriever brings back, and trace what came back.

        Args:
            moment: now.
            due: the questions.
            name: of the retriever, as in ``retriever_ways``.
            k: K0.
            shortcuts: asked with the same queries, if given.
            spread: look at how far the scores of all rows lie apart.
        """

    # Whether the answer is in memory.

    @abstractmethod
    def signals(self) -> Iterator[Signals]:
        """Tell all episodes, and give the signs of every question, told or not. Raises InputError, NotSupported."""

    # Reports.

    @abstractmethod
    def run_info(self, name: str | None, **seeds: int) -> dict[str, JsonValue]:
        """Return date, versions, device and seeds; ``name`` is that of the model, ``seeds`` are further ones."""

    @abstractmethod
    def age_tokens(self) -> dict[int, float]:
        """Return, by age, the mean number of text tokens told after the passage that it is counted from."""

    @abstractmethod
    def window_flaw(self, inside: Mapping[int, Sequence[bool]], tokens: int, least: float) -> str | None:
        """Return why a window is no fair baseline, if it is none.

        Args:
            inside: by age, which of the questions whose answers lie inside the window were answered right.
            tokens: of the window.
            least: the share of them that has to be.
        """

    @abstractmethod
    def curves(self, arms: Sequence[Arm], borderline: float | None) -> tuple[Curve, ...]:
        """Return the forgetting curves to draw beside the arms."""

    @abstractmethod
    def settings(self, options: ArmOptions, arms: Mapping[str, dict[str, JsonValue]]) -> dict[str, JsonValue]:
        """Return the settings for a report of retention; ``arms`` are those of each arm."""

    @abstractmethod
    def plain(self, kind: str, found: Mapping[str, JsonValue], name: str | None) -> dict[str, JsonValue]:
        """Return a report of another experiment, of the ``kind`` "retriever" or "abstention", as plain data."""
