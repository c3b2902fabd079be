"""The published retriever score and loss against the ones that are trained by default.

    python -m benchmarks.quality.scores 501 502          # adds to records/scores.json

The recipe recall-tiny is trained with each score and loss, in the language of four relations and in one with a fifth
whose values have two words; everything else is equal, the seeds too.
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
from mplus.evaluation.execution import ParallelStreams
from mplus.evaluation.health import retriever_health
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts
from mplus.facts.language import Language
from mplus.training import train
from mplus.training.recipe.files import read_recipe

RECORD = record_path("quality", "scores")
VARIANTS = {
    "mean_dot, contrastive": ("mean_dot", "contrastive"),
    "sigmoid_mean, contrastive": ("sigmoid_mean", "contrastive"),
    "sigmoid_mean, bce": ("sigmoid_mean", "bce"),
}
DEFAULT = "mean_dot, contrastive"
AGES = (1, 4, 8, 16, 32, 64, 128)
EVALUATION_SEED = 9


def settings(score: str, loss: str, relations: int) -> dict[str, Any]:
    """Return the settings that are changed in the recipe."""
    recipe = read_recipe("recall-tiny").recipe
    found: dict[str, Any] = {"memory.retriever.score": score}
    for place, stage in enumerate(recipe.stages):
        if stage.retriever_loss is not None:
            found[f"stages.{place}.retriever_loss.kind"] = loss
    if relations != Language().relations:
        found.update({f"data.{name}.language": {"relations": relations} for name in recipe.data})
    return found


def measure(variant: str, relations: int, seed: int, trained: Path | None) -> dict[str, Any]:
    """Train with one score and loss, unless ``trained`` has a model, and ask."""
    begun = time.perf_counter()
    if trained is not None:
        facts = json.loads((trained / "trained.json").read_text(encoding="utf-8"))
        model, restarts, seconds = mplus.from_pretrained(trained).eval(), facts["restarts"], facts["seconds"]
    else:
        changes = settings(*VARIANTS[variant], relations)
        with tempfile.TemporaryDirectory() as folder:
            result = train("recall-tiny", settings=changes, seed=seed, out=Path(folder) / "run", progress=False)
            model = mplus.from_pretrained(Path(folder) / "run" / "model").eval()
        restarts, seconds = result.restarts, round(time.perf_counter() - begun, 1)
    task = Facts(language=Language(relations=relations), ages=AGES, rounds=8, seed=EVALUATION_SEED)
    report = retention(ParallelStreams(model, task), ArmOptions(arms=("mplus", "mplus-oracle")))
    arms = {arm.name: arm for arm in report.arms}
    old = ParallelStreams(model, evolve(task, ages=AGES[-2:], rounds=4))
    health: Any = retriever_health(old, retrieved_tokens=[model.mplus_config.retrieved_tokens])
    (ranked,) = (found["trained"] for found in health["by_retrieved_tokens"].values())
    return {
        "seconds": seconds,
        "restarts": restarts,
        **{name: {str(cell.age): round(cell.accuracy, 4) for cell in arm.cells} for name, arm in arms.items()},
        "questions": arms["mplus"].cells[0].questions,
        "gold_recall_by_layer": ranked["gold_recall_by_layer"],
        "circumstances": run_info(seed=seed, evaluation_seed=EVALUATION_SEED),
    }


def main() -> None:
    """Run from the command line; what the record has already is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--relations", type=int, nargs="+", default=[4, 5])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--kept", type=Path, help="folder that benchmarks.quality.recall kept its decoders in")
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    record: dict[str, Any] = json.loads(given.record.read_text(encoding="utf-8")) if given.record.exists() else {}
    for relations in given.relations:
        for seed in given.seeds:
            for variant in given.variants:
                place = record.setdefault(f"{relations} relations", {}).setdefault(variant, {})
                if str(seed) in place:
                    continue
                same = given.kept is not None and variant == DEFAULT and relations == Language().relations
                kept = given.kept / f"recall-tiny-{seed}" if same else None
                place[str(seed)] = found = measure(variant, relations, seed, kept)
                print(relations, variant, seed, found["mplus"], found["gold_recall_by_layer"], flush=True)
                write(given.record, record)


if __name__ == "__main__":
    main()
