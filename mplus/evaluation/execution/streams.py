"""ParallelStreams: many streams of facts as dense tensors; all questions of a moment are answered in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import attrs
import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue
from mplus.environment import run_info
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
from mplus.evaluation.execution.stream_reading import (
    RandomSelector,
    RecencySelector,
    SelectSelector,
    StreamMoment,
    StreamWay,
    right_answers,
    stream_bytes,
)
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports.forgetting_curve import Curve, curves
from mplus.evaluation.reports.report import ARMS, Arm
from mplus.evaluation.retriever_swap import own_retriever
from mplus.evaluation.tasks.base import Episode
from mplus.evaluation.tasks.facts import Facts
from mplus.evaluation.tracing import check_retrieves
from mplus.facts.language import PAD, UNKNOWN
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.short_term.batched_prefix import RowSelector, ScoreSelector
from mplus.mechanisms.short_term.batched_streams import BatchedStreams
from mplus.mechanisms.streams import LayerRead, Read
from mplus.retrievers.base import Retriever
from mplus.training.batch import NO_SOURCE
from mplus.training.decoder import TrainedDecoder, make_batched_streams

QUESTION_TOKENS = 4
WINDOW_TOKENS = 64
"""Of the plain window, and of the chunks that BM25 brings, unless said otherwise."""
SCORING = "right where every token of the value is the most probable one given the question and the tokens before it"


@define(eq=False)
class _RetrieverWay:
    """A selector that health reads with, and one that selects for the same texts in turn; None for chance."""

    selector: RowSelector
    selecting: SelectSelector | None = field(default=None)


class ParallelStreams(Execution[StreamMoment, StreamWay]):
    """Facts of the little language, for a decoder trained on it: vectorised over streams and questions.

    It holds the rows that as many memories would hold, and answers as generating greedily would: the right answer is
    read along with the question, and counts where each of its tokens is the most probable one.

    Example:
        >>> report = retention(ParallelStreams(model, Facts(ages=(0, 16), streams=8)))  # doctest: +SKIP
    """

    task: Facts
    features = ("unknown_logit", "entropy", "confidence", "best_score", "score_margin")
    """Signs, in the order of the columns:

    - ``unknown_logit``: log-odds of the word "unknown" as the answer's first token;
    - ``entropy``: of the answer's first token without the word "unknown", in nats;
    - ``confidence``: probability of its best value, "unknown" left out;
    - ``best_score``: the retriever's best score of any row, short-term rows included, mean over layers;
    - ``score_margin``: the same, less the mean of all scores, in their standard deviations.
    """
    own_retriever = "trained"
    moment_limits = {"full-context": 1, "bm25": 4}  # noqa: RUF012 - declared as ClassVar by the base
    accuracy_digits = None
    equal_passages = True

    def __init__(
        self,
        model: MemoryModel,
        task: Facts,
        *,
        long_term_tokens: int | None = None,
        attention: Retriever | None = None,
        retrievers: Mapping[str, Retriever] | None = None,
    ) -> None:
        """Draw what is told and asked.

        Args:
            model: wrapped, trained on the language of facts; put into eval mode.
            task: what is told and asked.
            long_term_tokens: capacity of the streams; None: that of the config.
            attention: a retriever that scores by attention, for the arm "mplus-attention".
            retrievers: read with in place of the trained one, each for an arm "mplus-NAME".
        """
        self.model, self.task, self.ages = model, task, task.ages
        self.model.train(False)
        self.decoder = TrainedDecoder(model)
        config, mechanism = model.mplus_config, model.mplus_engine.mechanism
        own = config.long_term_tokens if mechanism.long_term else 0
        capacity = own if long_term_tokens is None else long_term_tokens
        # Without a limit there is room for every row ever written.
        self.long_term_tokens = task.passages * config.memory_tokens_per_chunk if capacity is None else capacity
        self.attention, self.retrievers = attention, dict(retrievers or {})
        self.unavailable = self._unavailable()
        self._ways: dict[str, _RetrieverWay] = {}
        self._long_term_rows = 0

    def _unavailable(self) -> dict[str, str]:
        reasons = {"snapkv": "kvpress cannot be installed beside this version of transformers; see benchmarks/snapkv"}
        if self.attention is None:
            reasons["mplus-attention"] = "no attention retriever was given"
        if not self.model.mplus_engine.mechanism.uses_retriever:
            reading = ("mplus", "mplus-random", "mplus-recency", "mplus-oracle")
            reasons.update(dict.fromkeys(reading, "the decoder was wrapped without long-term memory"))
        return reasons

    @property
    def steps(self) -> int:
        return self.task.passages

    @torch.no_grad()
    def moments(self, advance: Advance | None = None) -> Iterator[StreamMoment]:
        yield from self._moments(self.task, self.task.episodes(), advance)

    def _moments(self, task: Facts, episodes: Sequence[Episode], advance: Advance | None) -> Iterator[StreamMoment]:
        engine = self.model.mplus_engine
        streams = make_batched_streams(
            engine, range(len(episodes)), seed=task.seed, long_term_tokens=self.long_term_tokens
        )
        due = due_by_place(episodes, self.ages)
        for place in range(task.passages):
            ids = torch.stack([told.chunks[place] for told in task.told])
            streams.write(ids, torch.full((len(episodes),), place))
            if advance is not None:
                advance(1)
            self._long_term_rows = streams.ltm[0].count
            if place in due:
                yield self._moment(due[place], streams)

    def _moment(self, due: Sequence[Due], streams: BatchedStreams) -> StreamMoment:
        """Lay out the questions of all streams, equally many for each."""
        longest, pad = QUESTION_TOKENS + self.task.language.value_tokens, self.task.language.ids[PAD]
        asked = [self.task.ids(f"{one.question.prompt} {one.question.answers[0]}") for one in due]
        texts = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in asked]).view(len(streams), -1, longest)
        about = torch.tensor([one.question.needs[0] if one.question.told else NO_SOURCE for one in due])
        place = torch.arange(longest).expand_as(texts)
        queries = place < QUESTION_TOKENS
        return StreamMoment(due, streams, texts, queries, ~queries & (texts != pad), about.view(len(streams), -1))

    @property
    def answer_tokens(self) -> int:
        return self.task.language.value_tokens

    def passage(self, due: Due, number: int) -> list[int]:
        return self._passages[due.row][number]

    @cached_property
    def _passages(self) -> list[list[list[int]]]:
        """Return the ids of every chunk of each stream; as tensors they would be turned into lists time and again."""
        return [told.chunks.tolist() for told in self.task.told]

    def question(self, due: Due) -> list[int]:
        return self.task.ids(due.question.prompt)

    def words(self, texts: Sequence[str]) -> list[list[str]]:
        return [text.split() for text in texts]

    @property
    def arm_names(self) -> Sequence[str]:
        return (*ARMS, *(f"mplus-{name}" for name in self.retrievers))

    def arm_options(self, options: ArmOptions) -> ArmOptions:
        window = options.window_tokens or WINDOW_TOKENS
        passages = options.bm25_passages or window // self.task.chunk_tokens
        return attrs.evolve(options, window_tokens=window, bm25_passages=passages)

    def way(self, arm: str, options: ArmOptions) -> StreamWay | str:
        if arm == "mplus":
            return StreamWay(ScoreSelector(own_retriever(self.model)))
        if arm == "mplus-random":
            return StreamWay(RandomSelector(torch.Generator().manual_seed(self.task.seed)))
        if arm == "mplus-recency":
            return StreamWay(RecencySelector())
        if arm == "mplus-attention" and self.attention is not None:
            return StreamWay(ScoreSelector(self.attention))
        name = arm.removeprefix("mplus-")
        if name in self.retrievers:
            return StreamWay(SelectSelector(self.retrievers[name]))
        return StreamWay(oracle=arm == "mplus-oracle")  # "memoryllm": short-term memory only

    def read(self, moment: StreamMoment, due: Sequence[Due], way: StreamWay) -> list[Answer]:
        streams, selector = moment.memory, way.chosen(moment)
        read = self.decoder.read(streams, moment.texts, queries=moment.queries, selector=selector)
        seen = next(iter(read.layers.values()))
        fetched = 0 if seen.selected is None else seen.selected.shape[2]
        kept = stream_bytes(streams, long_term=selector is not None)
        attended = 1 + fetched + streams.rows + QUESTION_TOKENS
        return [Answer(right, kept, attended) for right in moment.right(read.logits).flatten().tolist()]

    def answer(self, due: Sequence[Due], contexts: Sequence[Sequence[int]], kept: Sequence[int]) -> list[Answer]:
        if not due:
            return []
        longest, pad = QUESTION_TOKENS + self.answer_tokens, self.task.language.ids[PAD]
        asked = [self.task.ids(f"{one.question.prompt} {one.question.answers[0]}") for one in due]
        texts = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in asked])
        front = torch.tensor([list(context) for context in contexts], dtype=torch.int64)
        logits = self.decoder.plain(torch.cat([front, texts], 1))[:, front.shape[1] :]
        answers = (torch.arange(longest) >= QUESTION_TOKENS) & (texts != pad)
        attended = front.shape[1] + QUESTION_TOKENS
        right = right_answers(logits, texts, answers).tolist()
        return [Answer(one, ID_BYTES * count, attended) for one, count in zip(right, kept, strict=True)]

    def retriever_ways(self, retrievers: Mapping[str, Retriever] | None) -> dict[str, Retriever | None]:
        check_retrieves(self.model)
        own = own_retriever(self.model)
        others = {"trained": own, **(self.retrievers if retrievers is None else retrievers)}
        self._ways = {name: _RetrieverWay(selector, selector) for name, selector in _selecting(others).items()}
        self._ways["trained"].selector = ScoreSelector(own)
        self._ways["random"] = _RetrieverWay(RandomSelector())
        return {**others, "random": None}

    def spread_tokens(self, tried: Sequence[int]) -> int:
        return int(self.model.mplus_config.retrieved_tokens)

    def traced(
        self, moment: StreamMoment, due: Sequence[Due], name: str, k: int, shortcuts: Shortcuts | None, spread: bool
    ) -> Trace:
        streams, about, way = moment.memory, moment.about, self._ways[name]
        read = self.decoder.read(
            streams, moment.texts, queries=moment.queries, selector=way.selector, retrieved_tokens=k
        )
        layers, spreads = [], []
        for layer, seen in read.layers.items():
            picked = about.new_empty(*about.shape, 0) if seen.selected_source is None else seen.selected_source
            columns = (
                streams.ltm[layer].source[:, None] == about[:, :, None],
                picked == about[:, :, None],
                streams.stm_source[layer][:, None] == about[:, :, None],
            )
            layers.append(RowCounts(*(column.sum(2).flatten() for column in columns)))
            if shortcuts is not None:
                self._compare(moment, layer, seen, shortcuts)
            if spread:
                scores = way.selector.score(layer, seen.text, moment.queries, self._rows(streams, layer))  # type: ignore[attr-defined]
                spreads.append([float(scores.float().std(2).mean())])
        return Trace(layers, moment.right(read.logits).flatten(), spreads)

    def _rows(self, streams: BatchedStreams, layer: int) -> Tensor:
        """Return the long-term rows ``[B, m, d]`` of a layer after its input norm."""
        norm, rows = self.decoder.engine.retrofit.anatomy.specs[layer].norm, streams.ltm[layer].hidden
        return rows if norm is None else norm(rows)

    def _compare(self, moment: StreamMoment, layer: int, seen: LayerRead, shortcuts: Shortcuts) -> None:
        """Let every retriever select for the first question of every stream."""
        streams, rows = moment.memory, self._rows(moment.memory, layer)
        if not rows.shape[1]:
            return
        following = {name: way.selecting for name, way in self._ways.items() if way.selecting is not None}
        stores = {name: selector.follow(layer, rows, streams.ltm[layer]) for name, selector in following.items()}
        for stream in range(len(streams)):
            views = {name: some[stream] for name, some in stores.items()}
            shortcuts.ask(layer, seen.text[stream, :1], moment.queries[stream, :1], views)

    @torch.no_grad()
    def signals(self) -> Iterator[Signals]:
        """Tell other streams to calibrate on, then those that are judged, and ask about told and untold facts."""
        for seed, untold_seed in ((self.task.seed + 1, 1), (self.task.seed, 2)):
            task = attrs.evolve(self.task, seed=seed, untold_seed=untold_seed)
            for moment in self._moments(task, task.episodes(), None):
                for told in (True, False):
                    part = self._moment([one for one in moment.due if one.question.told is told], moment.memory)
                    found, said_unknown = self._signs(part)
                    count = len(part.due)
                    calibrates = torch.full((count,), untold_seed == 1)
                    yield Signals(found, torch.full((count,), told), calibrates, said_unknown)

    def _signs(self, moment: StreamMoment) -> tuple[Tensor, Tensor]:
        """Return ``[n, len(features)]``, and whether "unknown" is the most probable answer."""
        retriever = self.model.mplus_engine.mechanism.retriever
        selector = None if retriever is None else ScoreSelector(retriever)
        read = self.decoder.read(
            moment.memory,
            moment.texts,
            queries=moment.queries,
            selector=selector,
            candidates=lambda layer, sources: torch.arange(sources.shape[1]).expand(sources.shape[0], -1).to(sources),
        )
        first = read.logits[:, :, QUESTION_TOKENS - 1].float()
        unknown = self.task.language.ids[UNKNOWN]
        # Clamped, so that a decoder that is quite sure has a finite logit.
        probability = first.softmax(-1)[:, :, unknown].clamp(1e-7, 1 - 1e-7)
        others = first.clone()
        # How sure it is among the answers: the share of "unknown" is a sign of its own.
        others[:, :, unknown] = -torch.inf
        shares = others.softmax(-1)
        columns = [
            probability.logit(),
            -(shares * shares.clamp(min=1e-30).log()).sum(-1),
            shares.max(-1).values,
            *_best_and_margin(selector, read, moment.queries),
        ]
        return torch.stack([column.flatten() for column in columns], 1), (first.argmax(-1) == unknown).flatten()

    def run_info(self, name: str | None, **seeds: int) -> dict[str, JsonValue]:
        return run_info(model=name, seed=self.task.seed)

    def age_tokens(self) -> dict[int, float]:
        return {age: float(age * self.task.chunk_tokens) for age in self.ages}

    def window_flaw(self, inside: Mapping[int, Sequence[bool]], tokens: int, least: float) -> str | None:
        worst = min((sum(some) / len(some) for some in inside.values()), default=1.0)
        return None if worst >= least else f"accuracy inside the window is {worst:.3f}, below {least}"

    def curves(self, arms: Sequence[Arm], borderline: float | None) -> tuple[Curve, ...]:
        config = self.model.mplus_config
        return curves(self.ages, config.memory_tokens_per_chunk, config.short_term_tokens, self.task.chance)

    def settings(self, options: ArmOptions, arms: Mapping[str, dict[str, JsonValue]]) -> dict[str, JsonValue]:
        language = self.task.language
        return {
            **self.task.settings(),
            "window_tokens": options.window_tokens,
            "long_term_tokens": self.long_term_tokens,
            "memory": self.model.mplus_config.to_dict(),
            "prompt": " ".join(language.question(0)),
            "told_as": " ".join(language.sentence(0, 0)),
            "stop_strings": [],
            "eos_token_ids": [],
            "truncation": "none",
            "scoring": SCORING,
            "people": len(language.people[self.task.held_out]),
        }

    def plain(self, kind: str, found: Mapping[str, JsonValue], name: str | None) -> dict[str, JsonValue]:
        report = {"ages": list(self.ages), **found, "circumstances": self.run_info(name)}
        if kind == "retriever":
            report["long_term_rows"] = self._long_term_rows
            report["logit_std_by_layer"] = report.pop("score_std_by_layer")
        return report


def _selecting(retrievers: Mapping[str, Retriever]) -> dict[str, SelectSelector]:
    return {name: SelectSelector(retriever) for name, retriever in retrievers.items()}


def _best_and_margin(selector: ScoreSelector | None, read: Read, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return best score and margin ``[B, A]``, mean over layers; zeros without a retriever."""
    best, margin = [], []
    for layer, seen in read.layers.items():
        if selector is None or seen.candidates is None:
            continue
        scores = selector.score(layer, seen.text, queries, seen.candidates).float()
        top = scores.max(2).values
        best.append(top)
        margin.append((top - scores.mean(2)) / scores.std(2).clamp(min=1e-6))
    if not best:
        zero = torch.zeros(queries.shape[:2])
        return zero, zero
    return torch.stack(best).mean(0), torch.stack(margin).mean(0)
