"""Whether maps of ``mplus train-retriever`` find more than ``hybrid`` on articles and in domains they never saw.

    mplus get smollm2                                        # once
    python -m benchmarks.quality.trained_retriever --data DATA --out DIR   # writes records/trained_retriever.json

Trained twice: on sentences cropped out of twelve novels alone, and with questions about paragraphs of 20 articles of
SQuAD besides; four further articles and the ends of the novels say when to stop. Tried on the other 24 articles, on
questions that people asked a search engine (Natural Questions), and on generated notes about people ("unseen"). All
settings are the defaults of the command, chosen by what is held out, never by what is tried.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict

from benchmarks.quality.chunk_retrieval import CUT, Case, notes, squad, wrapped_smollm2
from benchmarks.records import record_path, write
from mplus.config import Component, JsonValue
from mplus.environment import run_info
from mplus.evaluation.reports.paired import difference
from mplus.evaluation.texts import read
from mplus.mechanisms.kv.passes import BegunDecoder
from mplus.mechanisms.kv.state import state_of
from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.training.chunk_retriever import FitOptions, Pairs, PooledStates, train_chunk_retriever
from mplus.training.chunk_retriever.pooled import PooledDecoder
from mplus.training.chunk_retriever.report import hits
from mplus.training.chunk_retriever.run import MAPS, POOLED, pooled_pairs

RECORD = record_path("quality", "trained_retriever")
NOVELS = (
    "Barclay_Rosary_1909",
    "Blackmore_Erema_1877",
    "Braddon_Audley_1862",
    "Cbronte_Jane_1847",
    "Chesterton_Innocence_1911",
    "Conrad_Nostromo_1904",
    "Doyle_Lost_1912",
    "Gissing_Women_1893",
    "Hardy_Madding_1874",
    "Kipling_Kim_1901",
    "Stevenson_Treasure_1883",
    "Woolf_Night_1919",
)
ARTICLES, HELD_OUT = slice(0, 20), slice(20, 24)
TRIED = ("words", "hidden", "hybrid", "trained", "hybrid with trained")


def write_questions(data: Path, file: Path, tokenizer: Any) -> None:
    """Write questions about paragraphs of the first articles, those of the articles that are held out at the end."""
    articles = json.loads((data / "squad" / "dev-v1.1.json").read_text(encoding="utf-8"))["data"][ARTICLES]
    paragraphs = [one for article in articles for one in article["paragraphs"]]
    lines: list[dict[str, str]] = []
    for paragraph in random.Random(1).sample(paragraphs, 500):  # noqa: S311 - reproducible
        text = tokenizer.decode(tokenizer(paragraph["context"], add_special_tokens=False)["input_ids"][:CUT])
        answered = [one["question"] for one in paragraph["qas"] if one["answers"] and one["answers"][0]["text"] in text]
        lines += [{"question": question, "passage": text} for question in answered[:3]]
    held_out = squad(data / "squad" / "dev-v1.1.json", HELD_OUT, 55, tokenizer)
    lines += [{"question": question, "passage": held_out.passages[place]} for question, place in held_out.questions]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def write_extract(novel: Path, file: Path) -> Path:
    """Write 60,000 characters of a novel, from behind its first pages."""
    file.write_text(read(novel)[20_000:80_000], encoding="utf-8")
    return file


def natural_questions(data: Path, count: int, tokenizer: Any) -> Case:
    """Return questions of Natural Questions, each with its own article's passage, cut, which has the answer."""
    with gzip.open(data / "natural_questions" / "nq-open-oracle.jsonl.gz", "rt", encoding="utf-8") as opened:
        rows = [json.loads(line) for line in opened]
    random.Random(3).shuffle(rows)  # noqa: S311 - reproducible
    passages: dict[str, tuple[str, str]] = {}
    for row in rows:
        (context,) = row["ctxs"]
        if len(passages) < count and context["title"] not in passages:
            text = tokenizer.decode(tokenizer(context["text"], add_special_tokens=False)["input_ids"][:CUT])
            if any(answer in text for answer in row["answers"]):
                passages[context["title"]] = (text, row["question"])
    return Case([text for text, _ in passages.values()], [(q, n) for n, (_, q) in enumerate(passages.values())])


def tried(arguments: argparse.Namespace, tokenizer: Any) -> Iterator[tuple[str, Sequence[Case]]]:
    """Yield what the maps are tried on, none of which they saw: sets of passages that are searched one by one."""
    yield (
        "squad, 24 unseen articles",
        [squad(arguments.data / "squad" / "dev-v1.1.json", slice(24, None), 500, tokenizer)],
    )
    yield "natural questions", [natural_questions(arguments.data, 200, tokenizer)]
    yield "notes about people, 4 sets of 48", [notes(tokenizer, "unseen", seed, 48, 24, 0.0) for seed in range(4)]


def pairs_of(case: Case, tokenizer: Any) -> Pairs:
    """Return the pairs of a case, those that were told."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = Pairs([ids(text) for text in case.passages])
    for question, place in case.questions:
        if place >= 0:
            pairs.queries.append(ids(question))
            pairs.right.append(place)
    return pairs


class Tried:
    """A decoder, with the hidden states of all that retrievers are tried on."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        memory = model.new_memory(tokenizer=tokenizer)
        memory.write("Something to begin with.")
        (view,) = memory.snapshot()
        state, self.tokenizer = state_of(view), tokenizer
        reader = BegunDecoder(model.mplus_engine.decoder, [view], [state.begin_rows])
        self.pooled = PooledStates(folder / POOLED, reader, state.begin_ids)

    def facts(self, cases: Sequence[Case], maps: Path) -> dict[str, JsonValue]:
        """Return recall at 1 and 4 by retriever, and what the maps add to "hybrid", paired."""
        path: dict[str, JsonValue] = {"path": str(maps)}
        components = {name: Component(name) for name in TRIED[:3]}
        components |= {"trained": Component("trained", path), "hybrid with trained": Component("hybrid", path)}
        retrievers = {name: CHUNK_RETRIEVERS.build(component) for name, component in components.items()}
        decoder = PooledDecoder(self.pooled)
        calibrations = {name: one.calibrate(decoder, self.tokenizer) for name, one in retrievers.items()}
        found: dict[str, dict[int, dict[str, bool]]] = {name: {1: {}, 4: {}} for name in TRIED}
        for number, case in enumerate(cases):
            pairs = pairs_of(case, self.tokenizer)
            states = pooled_pairs(pairs, self.pooled, progress("reading what it is tried on"))
            for name, retriever in retrievers.items():
                own = hits(retriever, calibrations[name], self.tokenizer, pairs, states)
                for depth, right in own.items():
                    found[name][depth] |= {f"{number}/{place}": one for place, one in right.items()}
        facts: dict[str, JsonValue] = {"passages": len(cases[0].passages), "questions": len(found["words"][1])}
        for name, depths in found.items():
            one: dict[str, JsonValue] = {
                f"recall_at_{d}": round(sum(r.values()) / len(r), 4) for d, r in depths.items()
            }
            for base in ("hidden", "hybrid"):
                for depth, right in depths.items() if name.endswith("trained") else ():
                    over = asdict(difference(right, found[base][depth]))
                    one[f"over_{base}_at_{depth}"] = {key: round(value, 4) for key, value in over.items()}
            facts[name] = one
        return facts


def progress(what: str) -> Callable[[int], None]:
    """Return what prints after every few thousand tokens how many were read."""
    done = 0

    def add(tokens: int) -> None:
        nonlocal done
        if done // 5000 != (done + tokens) // 5000:
            print(what, done + tokens, flush=True)
        done += tokens

    return add


def main() -> None:
    """Train, try, and write the record after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with novels, squad and natural_questions")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of hidden states")
    parser.add_argument("--passages", type=int, default=132, help="of the novels")
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    model, tokenizer = wrapped_smollm2()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    novels = [write_extract(arguments.data / "novels" / f"{name}.txt.gz", out / f"{name}.txt") for name in NOVELS]
    write_questions(arguments.data, out / "questions.jsonl", tokenizer)
    record: dict[str, JsonValue] = {
        **run_info(config=model.mplus_config.to_dict(), decoder="SmolLM2-135M-Instruct"),
        "options": asdict(FitOptions()),
        "novels": list(NOVELS),
    }
    maps: dict[str, Path] = {}
    for name, questions in (("text", None), ("text and questions", out / "questions.jsonl")):
        add = progress(name)
        found = train_chunk_retriever(
            model,
            tokenizer,
            novels,
            out,
            questions=questions,
            passages=arguments.passages,
            step=lambda what, done, of, add=add: add(done),  # type: ignore[misc]
        )
        maps[name] = (out / MAPS).rename(out / f"{name}.safetensors")
        record[f"trained on {name}"] = {key: found[key] for key in ("pairs", "layers", "losses", "recall")}
        print(name, json.dumps(record[f"trained on {name}"]), flush=True)
        write(arguments.record, record)
    measured = Tried(model, tokenizer, out)
    for name, cases in tried(arguments, tokenizer):
        record[name] = {trained: measured.facts(cases, file) for trained, file in maps.items()}
        print(name, json.dumps(record[name]), flush=True)
        write(arguments.record, record)


if __name__ == "__main__":
    main()
