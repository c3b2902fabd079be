"""Scoring long-term rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.backends.triton.score import reasons_against_scoring, sigmoid_means
from mplus.bench.correctness import OK, SKIPPED, Verdict
from mplus.bench.fixtures.presets import Preset, check_room
from mplus.bench.machine import Machine
from mplus.bench.record import arm_entry, measured
from mplus.retrievers.scores import SCORES, score_rows
from mplus.timing import Arm, in_rounds, median, ratio

Scorer = Callable[[Tensor, Tensor], Tensor]
"""``scorer(queries [T, r], keys [M, r])`` -> ``[M]``."""
LENGTHS = (1, 16, 512)


def naive_sigmoid_mean(queries: Tensor, keys: Tensor) -> Tensor:
    """All products at once, as in the published code."""
    return torch.sigmoid(queries @ keys.T).mean(0)


def naive_mean_dot(queries: Tensor, keys: Tensor) -> Tensor:
    """All products at once."""
    return (queries @ keys.T).mean(0)


NAIVE: Mapping[str, Scorer] = {"sigmoid_mean": naive_sigmoid_mean, "mean_dot": naive_mean_dot}


def scorers() -> dict[str, Scorer]:
    """Every scorer by ``score/how``."""
    found: dict[str, Scorer] = {}
    for score in SCORES:
        found[f"{score}/mplus"] = lambda queries, keys, score=score: score_rows(score, [queries], keys)[0]  # type: ignore[misc]
        found[f"{score}/naive"] = NAIVE[score]
    found["sigmoid_mean/triton"] = lambda queries, keys: sigmoid_means(queries[None], None, keys)[0]
    return found


def measure(preset: Preset, device: torch.device, threads: Sequence[int], repeats: int) -> dict[str, Any]:
    """The record of ``mplus bench score``."""
    check_room(preset, device)
    verdicts = {name: check_scorer(name, scorer, preset, device) for name, scorer in scorers().items()}
    # In rounds the keys stay where they are, so all numbers of rows are views of the largest.
    queries, keys = draw(preset, device, max(LENGTHS), max(preset.score_rows))

    def section(machine: Machine) -> dict[str, Any]:
        return {
            "by_rows": {
                str(rows): {
                    str(length): _case(queries[:length], keys[:rows], verdicts, repeats, machine) for length in LENGTHS
                }
                for rows in preset.score_rows
            }
        }

    return measured("score", preset, device, threads, section, verdicts, repeats=repeats, width=preset.retriever_width)


def draw(preset: Preset, device: torch.device, length: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)
    size = (2 / preset.retriever_width**0.5) ** 0.5
    queries, keys = (size * torch.randn(count, preset.retriever_width, generator=generator) for count in (length, rows))
    return queries.to(device, preset.torch_dtype), keys.to(device, preset.torch_dtype)


def _case(
    queries: Tensor, keys: Tensor, verdicts: Mapping[str, Verdict], repeats: int, machine: Machine
) -> dict[str, Any]:
    usable = {name: scorer for name, scorer in scorers().items() if verdicts[name].status == OK}
    arms = [Arm(name, lambda _, scorer=scorer: scorer(queries, keys)) for name, scorer in usable.items()]  # type: ignore[misc]
    times = in_rounds(arms, repeats, queries.device)
    entries = {}
    for name, verdict in verdicts.items():
        taken = times.get(name)
        flops, nbytes = work(name, queries, keys)
        share = machine.share(flops, nbytes, median(taken)) if taken else None
        entries[name] = arm_entry(verdict, taken, share_of_roofline=share)
    found = {f"{score}_naive_over_mplus": ratio(times, f"{score}/naive", f"{score}/mplus") for score in SCORES}
    return {"arms": entries, "ratios": found}


def work(name: str, queries: Tensor, keys: Tensor) -> tuple[float, float]:
    """Operations and bytes that a score needs: every key once; for ``mean_dot`` one product per key is enough."""
    length = 1 if name.startswith("mean_dot") else queries.shape[0]
    return 2 * length * keys.numel(), keys.numel() * keys.element_size() + keys.shape[0] * 4


@torch.no_grad()
def check_scorer(name: str, scorer: Scorer, preset: Preset, device: torch.device) -> Verdict:
    """Against the naive score in float64."""
    verdict, naive = Verdict(), NAIVE[name.partition("/")[0]]
    if name.endswith("/triton"):
        reasons = reasons_against_scoring(*draw(preset, device, 1, 1))
        if reasons:
            return Verdict(SKIPPED, "; ".join(reasons))
    for length in (1, 17):
        queries, keys = draw(preset, device, length, 257, seed=length)
        truth = naive(queries.double(), keys.double())
        what = f"{length} queries by 257 keys"
        verdict.attempt(what, lambda q=queries, k=keys: scorer(q, k), truth, naive(queries, keys))  # type: ignore[misc]
    return verdict
