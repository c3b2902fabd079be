"""``mplus bench score``: the retriever's scoring of long-term rows alone, against one product over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mplus.backends.triton.score import reasons_against_scoring, sigmoid_means
from mplus.bench.correctness import OK, SKIPPED, CheckResult
from mplus.bench.presets import Preset, check_room
from mplus.bench.record import Entry, MachineRates, Record, Section, arm_entry, make_record
from mplus.retrievers.scores import SCORES, score_rows
from mplus.timing import Arm, in_rounds, median, ratio

Scorer = Callable[[Tensor, Tensor], Tensor]
"""``scorer(queries [T, r], keys [M, r])`` -> ``[M]``."""
LENGTHS = (1, 16, 512)
"""Numbers of queries."""

NAIVE: Mapping[str, Scorer] = {
    "sigmoid_mean": lambda queries, keys: torch.sigmoid(queries @ keys.T).mean(0),
    "mean_dot": lambda queries, keys: (queries @ keys.T).mean(0),
}
"""Score -> all products at once, as in the published code."""


def scorers() -> dict[str, Scorer]:
    """Return every scorer by ``score/implementation``."""
    found: dict[str, Scorer] = {}
    for score in SCORES:
        found[f"{score}/mplus"] = lambda queries, keys, score=score: score_rows(score, [queries], keys)[0]  # type: ignore[misc]
        found[f"{score}/naive"] = NAIVE[score]
    found["sigmoid_mean/triton"] = lambda queries, keys: sigmoid_means(queries[None], None, keys)[0]
    return found


def measure(preset: Preset, device: torch.device, threads: Sequence[int], repeats: int) -> Record:
    """Return the record of ``mplus bench score``."""
    check_room(preset, device)
    results = {name: check_scorer(name, scorer, preset, device) for name, scorer in scorers().items()}
    # In rounds the keys stay where they are, so all numbers of rows are views of the largest.
    queries, keys = draw(preset, device, max(LENGTHS), max(preset.score_rows))

    def section(rates: MachineRates) -> Section:
        return {
            "by_rows": {
                str(rows): {
                    str(length): _time_case(queries[:length], keys[:rows], results, repeats, rates)
                    for length in LENGTHS
                }
                for rows in preset.score_rows
            }
        }

    return make_record(
        "score", preset, device, threads, section, results, repeats=repeats, width=preset.retriever_width
    )


def draw(preset: Preset, device: torch.device, length: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw queries ``[T, r]`` and keys ``[m, r]`` whose products have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)
    size = (2 / preset.retriever_width**0.5) ** 0.5
    queries, keys = (size * torch.randn(count, preset.retriever_width, generator=generator) for count in (length, rows))
    return queries.to(device, preset.torch_dtype), keys.to(device, preset.torch_dtype)


def _time_case(
    queries: Tensor, keys: Tensor, results: Mapping[str, CheckResult], repeats: int, rates: MachineRates
) -> Section:
    """Time every scorer that is right, for these queries and keys."""
    right = {name: scorer for name, scorer in scorers().items() if results[name].status == OK}
    arms = [Arm(name, lambda _, scorer=scorer: scorer(queries, keys)) for name, scorer in right.items()]  # type: ignore[misc]
    times = in_rounds(arms, repeats, queries.device)
    entries: dict[str, Entry] = {}
    for name, result in results.items():
        taken = times.get(name)
        share = rates.roofline_share(*work(name, queries, keys), median(taken)) if taken else None
        entries[name] = arm_entry(result, taken)
        if share is not None:
            entries[name]["share_of_roofline"] = share
    ratios = {f"{score}_naive_over_mplus": ratio(times, f"{score}/naive", f"{score}/mplus") for score in SCORES}
    return {"arms": entries, "ratios": ratios}


def work(name: str, queries: Tensor, keys: Tensor) -> tuple[float, float]:
    """Return operations and bytes of a score: every key once; for ``mean_dot`` one product per key is enough."""
    length = 1 if name.startswith("mean_dot") else queries.shape[0]
    return 2 * length * keys.numel(), keys.numel() * keys.element_size() + keys.shape[0] * 4


@torch.no_grad()
def check_scorer(name: str, scorer: Scorer, preset: Preset, device: torch.device) -> CheckResult:
    """Check a scorer against the naive score in float64."""
    result, naive = CheckResult(), NAIVE[name.partition("/")[0]]
    if name.endswith("/triton"):
        reasons = reasons_against_scoring(*draw(preset, device, 1, 1))
        if reasons:
            return CheckResult(SKIPPED, "; ".join(reasons))
    for length in (1, 17):
        queries, keys = draw(preset, device, length, 257, seed=length)
        truth = naive(queries.double(), keys.double())
        what = f"{length} queries by 257 keys"
        result.check(what, lambda q=queries, k=keys: scorer(q, k), truth, naive(queries, keys))  # type: ignore[misc]
    return result
