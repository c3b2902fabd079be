"""Replaying golden traces: everything that was recorded of the published code is done again and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mplus.errors import CheckpointError
from mplus.interop.comparison import CaseReport
from mplus.interop.published import PublishedCheckpoint
from mplus.interop.replay import Heard, Permutations, Replay
from mplus.interop.trace import WEIGHTS, Step, Trace, find_cases

Progress = Callable[[str, int, int], None]
"""``progress(case, step, steps)``, called after every step."""


def replay(
    folder: str | Path,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    reset: bool = False,
    progress: Progress | None = None,
) -> list[CaseReport]:
    """Replay a case, or all cases in a folder, on the CPU with variant "published".

    Args:
        folder: a case (``config.json``, ``state_dict.safetensors``, ``steps.json``, ``trace.safetensors``) or a folder
            of cases.
        backend: attention backend, by name.
        dtype: of weights, memory and computation: float32 or float64.
        reset: start every step from the recorded state; otherwise the memory evolves by itself from the first one.
        progress: called after every step.

    Raises:
        CheckpointError: no cases there, or a damaged one.
        UnknownNameError: no such backend.
    """
    return list(replay_cases(folder, backend, dtype, reset=reset, progress=progress))


def replay_cases(
    folder: str | Path,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    reset: bool = False,
    progress: Progress | None = None,
) -> Iterator[CaseReport]:
    """As ``replay``, case by case."""
    if dtype not in (torch.float32, torch.float64):
        raise CheckpointError(f"golden traces are compared in torch.float32 or torch.float64, got {dtype}")
    for case in find_cases(folder):
        trace = Trace(case)
        player = _player(trace, backend, dtype)
        report = CaseReport(case.resolve().name, trace.model, backend, str(dtype).removeprefix("torch."))
        report.state("initial state", player, trace.initial)
        before = trace.initial
        for step in trace:
            if reset:
                player.adopt(before)
            before = step.after
            _play(step, player, report)
            report.steps += 1
            if progress is not None:
                progress(report.name, report.steps, len(trace))
        yield report


def _player(trace: Trace, backend: str, dtype: torch.dtype) -> Replay:
    checkpoint = PublishedCheckpoint.open(trace.folder, WEIGHTS)
    if checkpoint.config.kind != trace.model:
        raise CheckpointError(
            f"config.json in {trace.folder} must be of the model {trace.model!r}, got {checkpoint.config.kind!r}"
        )
    model, memory = checkpoint.load(
        dtype=dtype,
        rope_inv_freq_dtype=None,  # the traces were made with float32 frequencies
        config={"backend": backend},
        attn_implementation="eager" if backend == "reference" else "sdpa",
    )
    return Replay(model, memory)


def _play(step: Step, player: Replay, report: CaseReport) -> None:
    where = f"step {step.index} ({step.kind})"
    draw = Permutations(step.randperm)
    if step.kind == "merge":
        player.merge()
    elif step.kind == "inject":
        delta = step.inputs.get("delta_memory")
        made = player.inject(_given(step, "input_ids"), delta, bool(step.args.get("update_memory")), draw)
        report.measure("new tokens", where, made, _recorded(step, "delta_memory"))
    else:
        heard = _read(step, player, draw)
        _compare_read(step, where, heard, report)
        if "stm_retriever_weights" in step.outputs and heard.hidden_states is not None:
            scores = player.pool_scores(heard.hidden_states)
            report.measure("scores", f"{where}, pool", scores, step.outputs["stm_retriever_weights"])
    report.demand("permutations", where, len(draw), 0)
    report.state(where, player, step.after)


def _read(step: Step, player: Replay, draw: Permutations) -> Heard:
    if step.kind == "decode":
        return player.decode([_given(step, f"input_ids_{i}") for i in range(len(step.inputs))])
    ids = _given(step, "input_ids")
    if step.kind == "generate":
        return player.generate(ids, _recorded(step, "sequences").shape[1] - ids.shape[1])
    delta = step.inputs.get("delta_memory")
    if delta is None:
        return player.forward(ids)
    if step.args.get("cat_to_maximum_memory"):
        return player.forward_with_pool(ids, delta, draw)
    return player.forward_with_block(ids, delta)


def _compare_read(step: Step, where: str, heard: Heard, report: CaseReport) -> None:
    names = [f"logits_{i}" for i in range(len(heard.logits))] if step.kind == "decode" else ["logits"]
    for name, logits in zip(names, heard.logits, strict=True):
        report.measure("logits", where, logits, _recorded(step, name))
    if heard.hidden_states is not None:
        report.measure("hidden states", where, heard.hidden_states, _recorded(step, "hidden_states"))
    if heard.sequences is not None:
        report.demand("generated tokens", where, heard.sequences, _recorded(step, "sequences"))
    report.retrieval(where, heard.found, step.retrieval)


def _given(step: Step, name: str) -> Tensor:
    if name not in step.inputs:
        raise CheckpointError(f"step {step.index} ({step.kind}) must have an input {name!r}, which is missing")
    return step.inputs[name].to(torch.int64)


def _recorded(step: Step, name: str) -> Tensor:
    if name not in step.outputs:
        raise CheckpointError(f"step {step.index} ({step.kind}) must have an output {name!r}, which is missing")
    return step.outputs[name]
