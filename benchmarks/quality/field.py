"""Memories of the field side by side: one harness, one little language, each with the decoder that it has.

    python -m benchmarks.quality.field                              # writes records/field.json
    python -m benchmarks.quality.field --only kv scm --trained hmt=runs/hmt/model

Memories that need no training are read by the decoder of "recall-tiny", which learned the language from a window and
from M+. Others are measured where a model that was trained with them is given (``--trained NAME=FOLDER``); else they
stand in the record as not trained. With ``--only`` the others stay in the record as they were.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from attrs import define

import mplus
from benchmarks.quality.layer_tokens import counted
from benchmarks.records import load, record_path, write
from mplus.environment import run_info
from mplus.errors import MPlusError
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts
from mplus.hf.pretrained.shipped import load_recall
from mplus.mechanisms import MECHANISMS

AGES, STREAMS, ROUNDS, SEEDS, CHUNK = (0, 1, 4, 16, 64), 8, 4, (11, 12, 13), 16
TOLD = 16
"""Chunks that are told before costs are counted."""

CALLS = "speaks no calls"
"""Of triple stores: they have no parameters, and a decoder of the little language makes no calls."""


@define(frozen=True)
class Contender:
    """A memory as it is measured here.

    Attributes:
        mechanism: its name.
        settings: of the memory, for the decoder of "recall-tiny"; None: it has to be trained first.
        arms: of the harness, besides the one that bears its name; with "-oracle", that with the right passage among
            those that it brings back, and others at random.
        without: why nothing is measured where there are no settings and no trained folder.
    """

    mechanism: str
    settings: dict[str, Any] | None = None
    arms: tuple[str, ...] = ()
    without: str = "not trained yet"


SCM = {"name": "scm", "turns": 3, "needed": "off", "enough": "off", "summaries": "off", "recency": 0.0}
"""Settings for a decoder that makes no decisions: flash memory, and activation memory by words."""
CONTENDERS = {
    "mplus": Contender("mplus", {}, ("none", "window", "bm25", "memoryllm", "mplus-oracle")),
    "kv": Contender("kv", {"retrieved_tokens": 64}, ("kv-oracle",)),
    "memlong": Contender(
        "memlong",
        {"mechanism": {"name": "memlong", "group_tokens": CHUNK}, "retrieved_tokens": 64},
        ("memlong-oracle",),
    ),
    "scm": Contender("scm", {"mechanism": SCM}),
    "hmt": Contender("hmt"),
    "longmem": Contender("longmem", arms=("longmem-oracle",)),
    "lamemo": Contender("lamemo"),
    "retllm": Contender("retllm", without=CALLS),
    "memllm": Contender("memllm", without=CALLS),
}


def measured(contender: Contender, folder: Path | None) -> dict[str, Any]:
    """Measure one memory: retention for every seed of the facts, its oracle and its costs.

    The oracle answers from a memory that holds nothing but the passage that is asked for.
    """
    if contender.mechanism not in MECHANISMS.names():
        return {"status": "not installed"}
    if contender.settings is None and folder is None:
        return {"status": contender.without}
    found: list[Any] = []
    right = 0
    for seed in SEEDS:
        model, tokenizer = decoder(contender, folder)
        task = Facts(ages=AGES, streams=STREAMS, rounds=ROUNDS, seed=seed)
        options = RunOptions(streams=STREAMS, separator=" ")
        arms = ArmOptions(arms=(*contender.arms, contender.mechanism), window_tokens=64)
        execution = GeneratedAnswers(model, tokenizer, task, options=options)
        found.append(retention(execution, arms, progress=False).plain())
        alone = Facts(ages=(0,), streams=STREAMS * ROUNDS, rounds=1, seed=seed)
        execution = GeneratedAnswers(model, tokenizer, alone, options=options)
        own = ArmOptions(arms=(contender.mechanism,), window_tokens=64)
        right += retention(execution, own, progress=False).arm(contender.mechanism).cells[0].correct
        print(contender.mechanism, seed, {arm["name"]: arm["accuracy_by_age"] for arm in found[-1]["arms"]}, flush=True)
    cost = costs(model, tokenizer, task)
    oracle = {"correct": right, "questions": len(SEEDS) * STREAMS * ROUNDS}
    return {"status": "measured", "reports": found, "oracle": oracle, "costs": cost, "trained": folder is not None}


def decoder(contender: Contender, folder: Path | None) -> tuple[Any, Any]:
    """Load the decoder that a memory is measured with, and its tokenizer."""
    if folder is not None:
        from transformers import AutoTokenizer

        _, tokenizer = load_recall()
        if (folder / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return mplus.from_pretrained(folder).eval(), tokenizer
    model, tokenizer = load_recall()
    if contender.mechanism == "mplus":
        return model, tokenizer
    config = {"mechanism": contender.mechanism, "adapters": False, "chunk_tokens": CHUNK, **(contender.settings or {})}
    plain = mplus.unwrap(model)
    return mplus.wrap(plain, mplus.MPlusConfig.from_dict(config)).eval(), tokenizer


@torch.no_grad()
def costs(model: Any, tokenizer: Any, task: Facts) -> dict[str, float]:
    """Count the tokens that go through a decoder layer for each token written, and for a question besides its own."""
    episode = task.episodes()[0]
    # Before anything is counted: the first memory of a decoder may calibrate its retriever, which no write pays again.
    memory = model.new_memory(tokenizer=tokenizer)
    with counted(model) as passed:
        for passage in episode.passages[:TOLD]:
            memory.write(passage.text, source=passage.source)
        written = sum(len(tokenizer(passage.text)["input_ids"]) for passage in episode.passages[:TOLD])
        writing, passed[0] = passed[0], 0
        ids = torch.tensor([tokenizer(episode.questions[0].prompt)["input_ids"]])
        model.generate(ids, attention_mask=torch.ones_like(ids), memory=memory, max_new_tokens=1, do_sample=False)
        reading = passed[0]
    return {
        "layer_tokens_per_token_written": writing / written,
        "layer_tokens_per_question": reading,
        "question_tokens": float(ids.shape[1]),
    }


def main() -> None:
    """Measure what is asked for, and write the record anew after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--trained", nargs="*", default=[], metavar="NAME=FOLDER")
    asked = parser.parse_args()
    folders = {name: Path(folder) for name, folder in (one.split("=", 1) for one in asked.trained)}
    path = record_path("quality", "field")
    found = load("quality", "field")["memories"] if path.exists() else {}
    for name in asked.only:
        try:
            result = measured(CONTENDERS[name], folders.get(name))
        except MPlusError as error:
            result = {"status": "refused", "reason": f"{type(error).__name__}: {error}"}
        if not (result["status"] != "measured" and found.get(name, {}).get("status") == "measured"):
            found[name] = {**result, "circumstances": run_info()}
        settings = {"ages": AGES, "streams": STREAMS, "rounds": ROUNDS, "seeds": SEEDS, "chunk_tokens": CHUNK}
        order = {one: found[one] for one in CONTENDERS if one in found}
        write(path, {"settings": settings, "circumstances": run_info(), "memories": order})


if __name__ == "__main__":
    main()
