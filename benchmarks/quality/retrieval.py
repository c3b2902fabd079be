"""What retrieval from an index costs in answers, and for the score of the paper in recall.

python -m benchmarks.quality.retrieval retention               # writes records/retrieval-retention.json
mplus train recall-tiny --set memory.retriever.score=sigmoid_mean --seed 601 --out RUN
python -m benchmarks.quality.retrieval retention --model RUN/model    # adds to the same record
python -m benchmarks.quality.retrieval sigmoid                 # writes records/retrieval-sigmoid.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

import mplus
from benchmarks.records import record_path, write
from benchmarks.speed.retrieval import stored
from mplus.environment import run_info
from mplus.evaluation.execution import ParallelStreams
from mplus.evaluation.health import retriever_health
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.retriever_swap import with_own_parameters
from mplus.evaluation.tasks.facts import Facts
from mplus.hf.pretrained.shipped import load_recall
from mplus.retrievers.base import RetrieverShape
from mplus.retrievers.centroid import CentroidRetriever
from mplus.retrievers.faiss_ivf import FaissIvfRetriever
from mplus.retrievers.scores import score_rows

AGES = (8, 32, 128, 512, 1024, 2000)
INDEXES: dict[str, dict[str, int]] = {"faiss_ivf": {"least": 256}, "faiss_ivf-few": {"least": 256, "probes": 3}}
"""So that streams of a few thousand rows have an index too; and so that it looks into 1 of 60 cells, as of millions."""


def keep(model: Any, streams: int, rounds: int) -> dict[str, Any]:
    """Measure accuracy over age with other retrievers in place of the trained one, on the same streams and questions.

    Beside it, at the last age, the share of the exact best rows that each of them finds, and its time.
    """
    task = Facts(ages=AGES, streams=streams, rounds=rounds, seed=7)
    others = {name: with_own_parameters(model, "faiss_ivf", **options) for name, options in INDEXES.items()}
    others["centroid"] = with_own_parameters(model, "centroid")
    arms = ["memoryllm", "mplus", "mplus-random", *(f"mplus-{name}" for name in others)]
    rows = task.passages * model.mplus_config.memory_tokens_per_chunk
    report = retention(ParallelStreams(model, task, long_term_tokens=rows, retrievers=others), ArmOptions(arms=arms))
    old = ParallelStreams(model, evolve(task, ages=AGES[-1:], rounds=2), long_term_tokens=rows, retrievers=others)
    wanted = model.mplus_config.retrieved_tokens
    health: Any = retriever_health(old, retrieved_tokens=[wanted])
    return {
        "indexes": INDEXES,
        "wanted": wanted,
        "report": report.plain(),
        "shortcuts": health["by_retrieved_tokens"][str(wanted)],
        "long_term_rows": health["long_term_rows"],
    }


def beside(path: Path, model: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Return the record at ``path`` with what was found for the score of this model added."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"by_score": {}}
    score = model.mplus_engine.mechanism.retriever.facts()["score"]
    record["by_score"][score] = {**found, "circumstances": run_info(model=f"recall-tiny, {score}")}
    return record


def sigmoid(rows: int, tokens: int, draws: int, k: int = 256, width: int = 64) -> dict[str, Any]:
    """Measure the recall of the best rows by "sigmoid_mean" on drawn keys of 250 clusters and texts of a few of them.

    Args:
        rows, tokens: keys, and queries of a text.
        draws: texts, each with keys of its own.
        k: rows wanted.
        width: of keys.
    """
    shape, found = RetrieverShape(layers=1, hidden_size=1), {}
    options: dict[str, Any] = {"width": width, "score": "sigmoid_mean"}
    for clusters, spread in ((0, 0.5), (0, 2.0), (6, 0.5), (6, 2.0), (60, 2.0), (60, 6.0)):
        shares: dict[str, list[float]] = {"centroid": [], "faiss_ivf": []}
        for draw in range(draws):
            keys, text = _drawn(rows, tokens, width, clusters, spread, draw)
            store, mask = stored(keys), torch.ones(1, tokens, dtype=torch.bool)
            best = score_rows("sigmoid_mean", [text], keys)[0].topk(k).indices
            for retriever in (
                CentroidRetriever(shape, CentroidRetriever.Options(**options)),
                FaissIvfRetriever(shape, FaissIvfRetriever.Options(**options)),
            ):
                (selection,) = retriever.select(0, text[None], mask, [store], k)
                shares[retriever.name].append(float(torch.isin(best, selection.ids).float().mean()))
        where = f"{clusters or 'no'} clusters, std {spread}"
        found[where] = {
            name: {"recall": round(statistics.mean(some), 3), "lowest": round(min(some), 3)}
            for name, some in shares.items()
        }
        print(where, found[where], flush=True)
    return {"recall": found, "rows": rows, "tokens": tokens, "draws": draws, "wanted": k, "width": width}


def _drawn(rows: int, tokens: int, width: int, clusters: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw keys and queries whose products have this standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, width, generator=generator)

    keys, text = normal(rows), normal(tokens)
    if clusters:
        centers = normal(250)
        keys = centers[torch.randint(250, (rows,), generator=generator)] + keys / 2
        text = centers[torch.randint(clusters, (tokens,), generator=generator)] + text / 2
    return keys, text * spread / (text @ keys[:1000].T).std()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["retention", "sigmoid"])
    parser.add_argument("--rounds", type=int, default=24, help="for retention: rounds of questions")
    parser.add_argument("--streams", type=int, default=32, help="for retention")
    parser.add_argument("--model", type=Path, help="for retention: a model that recall-tiny was trained to")
    parser.add_argument("--record", type=Path, help="default: records/retrieval-WHAT.json")
    given = parser.parse_args()
    record = given.record or record_path("quality", f"retrieval-{given.what}")
    if given.what == "retention":
        model = load_recall()[0] if given.model is None else mplus.from_pretrained(given.model).eval()
        write(record, beside(record, model, keep(model, given.streams, given.rounds)))
    else:
        write(record, {**sigmoid(50_000, 256, 8), "circumstances": run_info(model="recall-tiny")})


if __name__ == "__main__":
    main()
