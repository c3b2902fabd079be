"""Train a recipe of the little language from several seeds and measure every one of them.

    python -m benchmarks.quality.recall recall-tiny 101 102 103 104 105     # writes records/recall-tiny.json

For each seed: training time and restarts, retention of all arms, retention for people never seen in training,
retriever health, and abstention. The table has every seed that was asked for. With ``--keep FOLDER`` the trained
decoders stay there; a seed that is there already is measured, not trained again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from attrs import evolve

import mplus
from benchmarks.records import record_path, write
from mplus.environment import run_info
from mplus.evaluation.abstention import abstention
from mplus.evaluation.execution import ParallelStreams
from mplus.evaluation.health import retriever_health
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts
from mplus.training import train

EVALUATION_SEED = 7
OLD = (48, 64, 96, 128)
"""Ages at which the STM has dropped every fact: only retrieval can answer."""


def trained(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one seed into ``folder``, unless it was trained before; return the facts of that run."""
    facts = folder / "trained.json"
    if not facts.exists():
        begun = time.perf_counter()
        result = train(recipe, seed=seed, out=folder / "run", progress=False)
        result.model.save_pretrained(folder, save_base=True)
        if result.tokenizer is not None:
            result.tokenizer.save_pretrained(folder)
        plain = {
            "seconds": round(time.perf_counter() - begun, 1),
            "restarts": result.restarts,
            "steps": result.steps,
            "circumstances": run_info(seed=seed),
        }
        facts.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return found


def measured(model: Any) -> dict[str, Any]:
    """Make all measurements of one decoder."""
    task = Facts(seed=EVALUATION_SEED)
    report = retention(ParallelStreams(model, task, attention=attention_retriever(model)))
    reading = ArmOptions(arms=("memoryllm", "mplus", "mplus-oracle"))
    held_out = retention(ParallelStreams(model, evolve(task, held_out=True)), reading)
    fewer = ParallelStreams(model, evolve(task, rounds=4))
    old = ParallelStreams(model, evolve(task, rounds=4, ages=OLD))
    return {
        "retention": report.plain(),
        "held_out": held_out.plain(),
        "health": retriever_health(old, retrieved_tokens=[2, 4, 8, 16, 32]),
        "abstention": abstention(fewer),
        "abstention_when_old": abstention(old),
    }


def attention_retriever(model: Any) -> Any:
    """Build the untrained retriever that scores rows by the layers' own attention."""
    from mplus.config import Component
    from mplus.retrievers.base import RetrieverShape
    from mplus.retrievers.build import build_retriever

    config = evolve(model.mplus_config, retriever=Component("attention"))
    shape = model.mplus_engine.shape
    retriever = build_retriever(config, RetrieverShape(layers=shape.layers, hidden_size=shape.width))
    model.mplus_engine.attach(retriever)
    return retriever


def run(recipe: str, seeds: list[int], looked_at: list[int], keep: Path, record: Path) -> None:
    """Train and measure every seed; the record is written anew after each."""
    found: dict[str, Any] = {}
    for seed in seeds:
        folder = keep / f"{recipe}-{seed}"
        facts = trained(recipe, seed, folder)
        model = mplus.from_pretrained(folder).eval()
        begun = time.perf_counter()
        result = measured(model)
        found[str(seed)] = {**facts, "evaluation_seconds": round(time.perf_counter() - begun, 1), **result}
        print(line(seed, found[str(seed)]), flush=True)
        whole = {
            "recipe": recipe,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "circumstances": run_info(evaluation_seed=EVALUATION_SEED),
            "seeds_asked_for": seeds,
            "seeds_looked_at": looked_at,
            "seeds": found,
        }
        write(record, whole)


def line(seed: int, facts: dict[str, Any]) -> str:
    """Return the most important numbers of one seed."""
    arms = {arm["name"]: arm for arm in facts["retention"]["arms"]}
    held = {arm["name"]: arm for arm in facts["held_out"]["arms"]}["mplus"]["accuracy_by_age"]

    def at(name: str, age: int) -> str:
        return f"{name} {arms[name]['accuracy_by_age'].get(str(age), float('nan')):.3f}"

    return (
        f"seed {seed}: {facts['seconds']:.0f} s, {facts['restarts']} restarts; at 128: {at('mplus', 128)}; at 64: "
        f"{', '.join(at(name, 64) for name in ('memoryllm', 'mplus-random', 'mplus-oracle'))}; held out: "
        f"{min(held.values()):.3f}; window {arms['window']['status']}; abstention AUROC "
        f"{facts['abstention']['combined']['auroc']:.4f}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--keep", type=Path, help="folder for the trained decoders")
    parser.add_argument("--looked-at", type=int, nargs="*", default=[], help="seeds the recipe was made with")
    parser.add_argument("--record", type=Path, help="file to write; default: records/RECIPE.json")
    given = parser.parse_args()
    record = given.record or record_path("quality", given.recipe)
    with tempfile.TemporaryDirectory() as folder:
        run(given.recipe, given.seeds, given.looked_at, given.keep or Path(folder), record)


if __name__ == "__main__":
    main()
