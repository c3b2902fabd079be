"""Whether the right chunk is found, by each chunk retriever: notes and SQuAD, told and untold questions.

    mplus get smollm2                                      # once
    python -m benchmarks.quality.chunk_retrieval --data DATA   # writes records/chunk_retrieval.json

Nothing is generated. Settings were chosen on the half "choose" of the notes and on the first 24 articles of SQuAD; the
record is of the half "test" and of the others. Keys of many chunks are made in batches of short passes, as they are
made when chunks are written one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus
from benchmarks.records import record_path, write
from mplus.config import JsonValue
from mplus.environment import run_info
from mplus.evaluation.abstention import auroc
from mplus.evaluation.tasks.notes import Notes
from mplus.evaluation.tasks.people.splits import Split
from mplus.evaluation.texts import Texts
from mplus.hf.pretrained.smollm2 import smollm2_folder
from mplus.mechanisms.kv.asked import Asked
from mplus.mechanisms.kv.passes import BegunDecoder, padded
from mplus.mechanisms.kv.retrieval import Retrieval
from mplus.mechanisms.kv.state import state_of
from mplus.retrievers.chunks import CHUNK_RETRIEVERS, Chunks, Query

RECORD = record_path("quality", "chunk_retrieval")
RETRIEVERS = ("words", "hidden", "hybrid")
INSTRUCTION = " Answer with one short sentence."
BATCH = 16
CUT = 128
"""Tokens of a paragraph, as many as a chunk has."""


@define(frozen=True, eq=False)
class Case:
    """Passages, and questions with the place of the one that answers it; -1: it was not told."""

    passages: Sequence[str]
    questions: Sequence[tuple[str, int]]


def wrapped_smollm2() -> tuple[Any, Any]:
    """Return SmolLM2 wrapped with kv, and its tokenizer."""
    folder = smollm2_folder()
    decoder = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return mplus.wrap(decoder, {"mechanism": "kv"}, check=False), tokenizer


def notes(tokenizer: Any, split: Split, seed: int, count: int, asked: int, changed: float) -> Case:
    """Return generated notes about people."""
    options = Notes.Options(
        notes=count, questions=asked, untold=asked, split=split, seed=seed, changed=changed, prompt="{question}"
    )
    (episode,) = Notes(options, Texts(tokenizer)).episodes()
    questions = [(one.prompt, one.needs[0] if one.needs else -1) for one in episode.questions]
    return Case([one.text for one in episode.passages], questions)


def squad(file: Path, articles: slice, count: int, tokenizer: Any) -> Case:
    """Return the first paragraphs of articles, cut, each with a question that it answers."""
    passages: list[str] = []
    asked: list[tuple[str, int]] = []
    found = json.loads(file.read_text(encoding="utf-8"))["data"][articles]
    for paragraph in (one for article in found for one in article["paragraphs"]):
        ids = tokenizer(paragraph["context"], add_special_tokens=False)["input_ids"][:CUT]
        text = tokenizer.decode(ids)
        fitting = [one["question"] for one in paragraph["qas"] if one["answers"] and one["answers"][0]["text"] in text]
        if fitting and len(passages) < count:
            asked.append((fitting[len(passages) % len(fitting)], len(passages)))
            passages.append(text)
    return Case(passages, asked)


class Measured:
    """A decoder with a memory, whose chunks are exchanged for those of a case."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.engine, self.tokenizer = model.mplus_engine, tokenizer
        memory = model.new_memory(tokenizer=tokenizer)
        memory.write("Something to begin with.")
        (self.view,) = memory.snapshot()
        self.reader = BegunDecoder(self.engine.decoder, [self.view], [state_of(self.view).begin_rows])
        self.keys = CHUNK_RETRIEVERS.get("hybrid")()
        self.threshold: dict[str, float] = {}
        self.made: dict[Case, Chunks] = {}

    @torch.no_grad()
    def chunks(self, passages: Sequence[str]) -> Chunks:
        """Return the chunks of passages, with keys."""
        state, ids = state_of(self.view), [self.ids(text) for text in passages]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        keys: dict[int, Tensor] = {}
        for first in range(0, len(order), BATCH):
            some = order[first : first + BATCH]
            texts, mask = padded([ids[place] for place in some])
            states = self.reader.hidden_states(texts, mask)
            for row, place in enumerate(some):
                length = len(ids[place])
                own = [layer[row : row + 1, :length] for layer in states]
                (keys[place],) = self.keys.chunk_keys(ids[place][None], own, state.calibration, self.tokenizer)
        lengths = torch.tensor([len(one) for one in ids])
        table = torch.stack([keys[place] for place in range(len(ids))])
        return Chunks(lengths, torch.cat(ids).int(), table, state.calibration, self.tokenizer)

    def ids(self, text: str) -> Tensor:
        """Return the ids of a text, ``[n]``."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def scores(self, case: Case, suffix: str = "") -> dict[str, Tensor]:
        """Return the scores ``[q, c]`` of all chunks by each retriever; note its threshold."""
        if case not in self.made:
            self.made[case] = self.chunks(case.passages)
        chunks, retrieval = self.made[case], Retrieval(retriever=self.keys)
        asked = [
            Asked(self.view, self.reader.begins[0], self.ids(question + suffix), torch.empty(0), CUT)
            for question, _ in case.questions
        ]
        queries: list[Sequence[Query]] = []
        for first in range(0, len(asked), BATCH):
            queries += retrieval.queries(self.engine.decoder, asked[first : first + BATCH], self.tokenizer)
        found: dict[str, Tensor] = {}
        for name in RETRIEVERS:
            retriever = CHUNK_RETRIEVERS.get(name)()
            each = [torch.stack([retriever.scores(one, chunks) for one in own]).amax(0) for own in queries]
            found[name], self.threshold[name] = torch.stack(each), retriever.threshold(chunks)
        return found


def recall(scores: Tensor, case: Case, depth: int) -> float:
    """Return the share of told questions whose chunk is among the ``depth`` best."""
    right = torch.tensor([place for _, place in case.questions])
    told = right >= 0
    best = scores[told].topk(depth, 1).indices
    return float((best == right[told][:, None]).any(1).double().mean())


def facts(scores: Mapping[str, Tensor], case: Case, thresholds: Mapping[str, float]) -> dict[str, JsonValue]:
    """Return recall by retriever, and how well the best score tells what was told."""
    told = torch.tensor([place >= 0 for _, place in case.questions])
    found: dict[str, JsonValue] = {"chunks": len(case.passages), "told": int(told.sum()), "untold": int((~told).sum())}
    for name, values in scores.items():
        best = values.amax(1)
        one: dict[str, JsonValue] = {f"recall_at_{depth}": round(recall(values, case, depth), 4) for depth in (1, 4)}
        one["told_rejected"] = round(float((best[told] <= thresholds[name]).double().mean()), 4)
        if bool((~told).any()):
            one["untold_rejected"] = round(float((best[~told] <= thresholds[name]).double().mean()), 4)
            one["auroc"] = round(auroc(best[told], best[~told]), 4)
        found[name] = one
    return found


ORDERS: Mapping[str, Mapping[str, Any]] = {
    "by score": {"rerank": 0},
    "late interaction": {"rerank": 6},
    "and likelihood": {"rerank": 6, "likelihood": True},
}
"""How the best chunks are reordered."""


def reordered(model: Any, tokenizer: Any, case: Case, order: Mapping[str, Any]) -> dict[str, JsonValue]:
    """Write the passages, and return how often the first chunk that comes back is the right one."""
    memory = model.new_memory(tokenizer=tokenizer)
    for place, text in enumerate(case.passages):
        memory.write(text, str(place))
    (view,) = memory.snapshot()
    decoder, begin = model.mplus_engine.decoder, state_of(view).begin_rows
    retrieval = Retrieval(retriever=model.mplus_engine.mechanism.chunk_retriever, chunks=1, **order)
    right, seconds = [], []
    for question, place in case.questions:
        if place >= 0:
            ids = torch.tensor(tokenizer(question, add_special_tokens=False)["input_ids"])
            begun = time.perf_counter()
            (found,) = retrieval.choose(decoder, [Asked(view, begin, ids, ids[:0], 1024)], tokenizer)
            seconds.append(time.perf_counter() - begun)
            right.append(found.chunks.tolist() == [place])
    return {"right": sum(right), "of": len(right), "median_s": round(sorted(seconds)[len(seconds) // 2], 3)}


def measured(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, JsonValue]]]:
    """Yield each part of the record, as it is there."""
    reader = Measured(model, tokenizer)
    for seed in range(arguments.sets):
        for changed in (0.0, 0.5) if seed < 2 else (0.0,):
            case = notes(tokenizer, arguments.split, seed, 48, 24, changed)
            part = facts(reader.scores(case), case, reader.threshold)
            part["with_instruction"] = facts(reader.scores(case, INSTRUCTION), case, reader.threshold)
            if arguments.reordered:
                part["hybrid_first"] = {
                    name: reordered(model, tokenizer, case, order) for name, order in ORDERS.items()
                }
            yield f"notes 48, set {seed}, changed {changed}", part
    articles = slice(24, None) if arguments.split == "test" else slice(24)
    case = squad(arguments.data / "squad" / "dev-v1.1.json", articles, arguments.paragraphs, tokenizer)
    yield f"squad {len(case.passages)}", facts(reader.scores(case), case, reader.threshold)
    if arguments.notes:
        case = notes(tokenizer, arguments.split, 100, arguments.notes, 100, 0.0)
        yield f"notes {arguments.notes}", facts(reader.scores(case), case, reader.threshold)


def main() -> None:
    """Measure, and write the record after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad/dev-v1.1.json")
    parser.add_argument("--split", choices=("choose", "test"), default="test")
    parser.add_argument("--sets", type=int, default=5, help="sets of 48 notes")
    parser.add_argument("--paragraphs", type=int, default=500)
    parser.add_argument("--notes", type=int, default=1000, help="notes of one large set; 0: none")
    parser.add_argument("--reordered", action="store_true", help="how often the first is right, by each order")
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    model, tokenizer = wrapped_smollm2()
    record: dict[str, JsonValue] = {
        **run_info(config=model.mplus_config.to_dict(), decoder="SmolLM2-135M-Instruct"),
        "settings": {name: getattr(arguments, name) for name in ("split", "sets", "paragraphs", "notes")},
    }
    for name, part in measured(model, tokenizer, arguments):
        record[name] = part
        print(name, json.dumps(part), flush=True)
        write(arguments.record, record)


if __name__ == "__main__":
    main()
