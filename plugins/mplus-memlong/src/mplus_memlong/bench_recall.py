"""What a decoder of the recipe "memlong-tiny" remembers, with all groups in front of a question and with a few.

mplus train memlong-tiny --out run
python -m mplus_memlong.bench_recall run found.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mplus
from mplus.environment import load_average, run_info
from mplus.evaluation.execution import GeneratedAnswers
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts
from mplus.facts.episodes import recall_tokenizer
from mplus.facts.language import Language
from mplus.hf.reading.override import reading_as

AGES, STREAMS, ROUNDS = (0, 4, 16, 64), 8, 4
GROUPS = {"all": 1136, "four": 64, "one": 16}
"""Tokens that are found, in groups of 16; a stream is told 1136."""


def main(run: str, record: str) -> None:
    """Ask, and write the record."""
    model = mplus.from_pretrained(Path(run) / "model").eval()
    task = Facts(ages=AGES, streams=STREAMS, rounds=ROUNDS)
    options = RunOptions(ages=AGES, streams=STREAMS, separator=" ")
    execution = GeneratedAnswers(model, recall_tokenizer(Language()), task, options=options)
    found, held = {}, {}
    for name, tokens in GROUPS.items():
        with reading_as(model, retrieved_tokens=tokens):
            report = retention(execution, ArmOptions(arms=("memlong", "memlong-oracle")), progress=False)
        found[name] = {str(cell.age): cell.accuracy for cell in report.arm("memlong").cells}
        held[name] = {str(cell.age): cell.recall for cell in report.arm("memlong").cells}
    # With the right group among those that are read, and the others at random.
    oracle = {str(cell.age): cell.accuracy for cell in report.arm("memlong-oracle").cells}
    told = {"accuracy_by_age": found, "right_group_found_by_age": held, "oracle_of_one_by_age": oracle}
    facts = {"questions_per_age": STREAMS * ROUNDS, "load_average": load_average(), **told}
    config = {"config": model.mplus_config.to_dict(), "seed": 0}
    Path(record).parent.mkdir(exist_ok=True, parents=True)
    Path(record).write_text(json.dumps({**run_info(**config), **facts}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
