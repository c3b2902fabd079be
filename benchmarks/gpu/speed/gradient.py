"""Forward and backward of one layer's attention over memory and text, by every backend: what training takes."""

from __future__ import annotations

import torch
from attrs import evolve

from benchmarks.gpu.gates.attention import refuse
from benchmarks.gpu.session import Session
from benchmarks.gpu.speed.benches import fitting
from mplus.backends import BACKENDS
from mplus.backends.base import AttentionRequest, Segment
from mplus.bench.correctness import random_request
from mplus.environment import run_info
from mplus.errors import NotSupported
from mplus.timing import Arm, in_rounds, median, ratio

NAMES = ("triton", "sdpa", "reference")
ROUNDS = 10
CASES = ((512, 2_561, 512), (2048, 2_561, 2048))
"""Queries, memory rows and text keys."""


def gradient(session: Session) -> None:
    """Time a step with every backend that can take it."""
    preset = fitting(session)
    cases = ((8, 16, 8),) if session.tiny else CASES
    rounds = 2 if session.tiny else ROUNDS
    found = []
    for case in cases:
        request = learning(random_request(preset, session.device, case, 0))
        arms, reasons = [], {}
        for name in NAMES:
            backend = BACKENDS.get(name)()
            try:
                refuse(backend, request)
                step(backend.attend, request)
            except (NotSupported, RuntimeError) as error:
                reasons[name] = f"{type(error).__name__}: {error}"[:300]
            else:
                arms.append(Arm(name, lambda _, attend=backend.attend, request=request: step(attend, request)))  # type: ignore[misc]
        times = in_rounds(arms, rounds, session.device)
        ms = {name: round(1000 * median(taken), 4) for name, taken in times.items()}
        ratios = {f"{name}_over_sdpa": ratio(times, name, "sdpa") for name in times}
        found.append({"case": case, "ms": ms, "ratios": ratios, "refused": reasons})
        record = {
            "kind": "gradient",
            "preset": preset.name,
            "rounds": rounds,
            "cases": found,
            "circumstances": run_info(),
        }
        shown = {f"{one['case'][0]} queries, {name}": value for one in found for name, value in one["ratios"].items()}  # type: ignore[attr-defined,index]
        session.write("record", name=f"gradient-{preset.name}", ratios=shown, record=record)


def learning(request: AttentionRequest) -> AttentionRequest:
    """Return the request with gradients wanted for queries, keys and values of text and memory."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone().requires_grad_()

    return evolve(
        request,
        queries=leaf(request.queries),
        keys=leaf(request.keys),
        values=leaf(request.values),
        segments=tuple(Segment(leaf(one.keys), leaf(one.values)) for one in request.segments),
    )


@torch.enable_grad()
def step(attend: object, request: AttentionRequest) -> None:
    """Attend, and take the gradients of all inputs."""
    output = attend(request).output  # type: ignore[operator]
    leaves = [request.queries, request.keys, request.values]
    leaves += [part for one in request.segments for part in (one.keys, one.values)]
    torch.autograd.grad(output, leaves, torch.ones_like(output))
