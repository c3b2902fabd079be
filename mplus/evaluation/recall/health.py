"""Retriever health: does it bring back what a question needs, and does that decide the answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.evaluation.abstention import check_mechanism
from mplus.evaluation.ann_recall import Shortcuts
from mplus.evaluation.recall.arms import MemoryArm, right_answers
from mplus.evaluation.recall.facts import Round, Telling, rounds
from mplus.evaluation.recall.retention import tell
from mplus.evaluation.recall.selection import RandomPicker, SelectPicker
from mplus.retrievers.base import Retriever
from mplus.training.batched.read import DenseDecoder, Read
from mplus.training.batched.selection import Picker, ScorePicker
from mplus.training.batched.stream_batch import StreamBatch


class _Counter:
    """Sums over rounds, for one picker and one K0."""

    def __init__(self, layers: int) -> None:
        self.have = torch.zeros(layers)
        self.hit = torch.zeros(layers)
        self.possible = torch.zeros(layers)
        self.useful = torch.zeros(layers)
        self.asked = 0
        self.right = 0
        self.by_hit = torch.zeros(2, 2)

    def add(self, read: Read, streams: StreamBatch, about: Tensor, right: Tensor) -> None:
        """``about`` and ``right`` are ``[B, A]``."""
        found, held = torch.zeros_like(about), torch.zeros_like(about)
        for layer, seen in read.layers.items():
            have = (streams.ltm[layer].source[:, None] == about[:, :, None]).sum(2)
            hit = (
                torch.zeros_like(have)
                if seen.picked_source is None
                else (seen.picked_source == about[:, :, None]).sum(2)
            )
            self.have[layer] += have.sum()
            self.hit[layer] += hit.sum()
            self.possible[layer] += (have > 0).sum()
            self.useful[layer] += (hit > 0).sum()
            found += hit
            held += (streams.stm_source[layer][:, None] == about[:, :, None]).sum(2)
        self.asked += about.numel()
        self.right += int(right.sum())
        alone = held == 0  # nothing of the fact is left in any STM, so only retrieval can answer
        for got in (0, 1):
            chosen = alone & ((found > 0) == bool(got))
            self.by_hit[got] += torch.stack([right[chosen].sum(), chosen.sum()])

    def plain(self) -> dict[str, Any]:
        return {
            "questions": self.asked,
            "accuracy": self.right / self.asked,
            "gold_recall_by_layer": _shares(self.hit, self.have),
            "any_useful_row_by_layer": _shares(self.useful, self.possible),
            "accuracy_with_hit": _share(self.by_hit[1]),
            "accuracy_without_hit": _share(self.by_hit[0]),
            "questions_with_hit": int(self.by_hit[1, 1]),
            "questions_without_hit": int(self.by_hit[0, 1]),
        }


@torch.no_grad()
def retriever_health(
    model: Any,
    telling: Telling,
    *,
    retrieved_tokens: Sequence[int] | None = None,
    long_term_tokens: int | None = None,
    retrievers: Mapping[str, Retriever] | None = None,
) -> dict[str, Any]:
    """Gold recall per layer, share of questions with any useful row, accuracy with and without one, over several K0.

    Beside them, on the queries of the trained retriever's reads: the share of the exact best rows that each retriever
    finds, and how long it takes.

    Args:
        model: wrapped, trained on the recall language, in eval mode.
        telling: its ages should be old enough that the STM has dropped the fact.
        retrieved_tokens: the K0 to try; None: a quarter to four times that of the config.
        long_term_tokens: capacity of the streams; None: that of the config.
        retrievers: asked besides the trained and a random one.

    Returns:
        Plain data: per K0 what each of them finds, and per layer the standard deviation of the trained one's scores
        over the rows.

    Raises:
        NotSupported: the decoder's mechanism is not M+ with long-term memory.
        ConfigError: a setting that streams would not follow.
    """
    check_mechanism(model)
    trained = model.mplus_config.retrieved_tokens
    tried = [trained // 4, trained // 2, trained, 2 * trained, 4 * trained]
    tried = [k for k in tried if k > 0] if retrieved_tokens is None else list(retrieved_tokens)
    retriever = model.mplus_engine.mechanism.additions.retriever
    selecting = {name: SelectPicker(one) for name, one in {"trained": retriever, **(retrievers or {})}.items()}
    pickers: dict[str, Picker] = {**selecting, "trained": ScorePicker(retriever), "random": RandomPicker()}
    layers = model.mplus_engine.layout.layers
    shortcuts = {k: Shortcuts(retriever, {n: p.retriever for n, p in selecting.items()}, k, layers) for k in tried}
    counters = {(name, k): _Counter(layers) for name in pickers for k in tried}
    episodes, decoder = telling.episodes(), DenseDecoder(model)
    tellings = tell(model, telling, episodes, long_term_tokens)
    spread: list[Tensor] = []
    for asked in rounds(telling, episodes):
        streams = tellings.up_to(asked.told)
        for (name, k), counter in counters.items():
            arm = MemoryArm(name, pickers[name], k)
            answered = arm.answer(decoder, streams, asked, episodes)
            if answered.read is not None:
                counter.add(answered.read, streams, asked.about, right_answers(answered.read.logits, asked))
                if name == "trained":
                    _compare(decoder, streams, asked, answered.read, selecting, shortcuts[k])
        spread.append(_spread(decoder, streams, asked, ScorePicker(retriever)))
    return {
        "ages": list(telling.ages),
        "long_term_rows": streams.ltm[0].count,
        "trained_with": trained,
        "logit_std_by_layer": [round(float(x), 4) for x in torch.stack(spread).mean(0)],
        "by_retrieved_tokens": {
            str(k): {name: {**counters[name, k].plain(), **shortcuts[k].plain().get(name, {})} for name in pickers}
            for k in tried
        },
    }


def _compare(
    decoder: DenseDecoder,
    streams: StreamBatch,
    asked: Round,
    read: Read,
    selecting: Mapping[str, SelectPicker],
    shortcuts: Shortcuts,
) -> None:
    """Let every retriever select for the first question of every stream, in every layer."""
    for layer, seen in read.layers.items():
        norm, rows = decoder.engine.retrofit.anatomy.specs[layer].norm, streams.ltm[layer].hidden
        rows = rows if norm is None else norm(rows)
        if not rows.shape[1]:
            continue
        stores = {name: picker.follow(layer, rows, streams.ltm[layer]) for name, picker in selecting.items()}
        for stream in range(len(streams)):
            views = {name: some[stream] for name, some in stores.items()}
            shortcuts.ask(layer, seen.text[stream, :1], asked.queries[stream, :1], views)


def _spread(decoder: DenseDecoder, streams: StreamBatch, asked: Any, picker: ScorePicker) -> Tensor:
    """``[L]``: standard deviation over the long-term rows of the score, mean over questions."""
    read = decoder.read(streams, asked.texts, queries=asked.queries, picker=picker)
    found = []
    for layer, seen in read.layers.items():
        norm = decoder.engine.retrofit.anatomy.specs[layer].norm
        rows = streams.ltm[layer].hidden
        scores = picker.score(layer, seen.text, asked.queries, rows if norm is None else norm(rows))
        found.append(scores.float().std(2).mean())
    return torch.stack(found)


def _shares(part: Tensor, whole: Tensor) -> list[float | None]:
    return [_share(torch.stack(pair)) for pair in zip(part, whole, strict=True)]


def _share(pair: Tensor) -> float | None:
    """``pair[0] / pair[1]``; None where nothing was counted."""
    return round(float(pair[0] / pair[1]), 4) if float(pair[1]) else None
