"""PublishedPlayer: traces of the published code of M+ and MemoryLLM, replayed with variant "published"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mplus.errors import CheckpointError
from mplus.interop.golden import TracePlayer
from mplus.interop.report import CaseReport
from mplus.interop.trace import WEIGHTS, Permutations, Recorded, RecordedRetrieval, Step, Trace

if TYPE_CHECKING:
    from mplus.interop.published_stream import Found, Heard, PublishedStream

MEASURED = ("logits", "hidden states", "new tokens", "memory", "LTM", "ages", "keys", "scores")
"""What may differ by rounding; waiting rows count as LTM."""
EQUAL = ("retrieved ids", "generated tokens", "counters", "recall frequencies", "permutations")
"""What must be equal."""


class PublishedPlayer(TracePlayer):
    """Plays a case of M+ or MemoryLLM with the published checkpoint that lies in it.

    Attributes:
        trace: what was recorded.
        stream: goes through the steps.
    """

    quantities = (*MEASURED, *EQUAL)

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        from mplus.interop.published import PublishedCheckpoint  # with transformers, which naming a player needs not
        from mplus.interop.published_stream import PublishedStream

        super().__init__(folder, backend, dtype)
        self.trace = Trace(folder)
        checkpoint = PublishedCheckpoint.open(folder, WEIGHTS)
        if checkpoint.config.kind != self.trace.model:
            raise CheckpointError(
                f"config.json in {folder} must be of the model {self.trace.model!r}, got {checkpoint.config.kind!r}"
            )
        model, memory = checkpoint.load(
            dtype=dtype,
            rope_inv_freq_dtype=None,  # the traces were made with float32 frequencies
            config={"backend": backend},
            attn_implementation="eager" if backend == "reference" else "sdpa",
        )
        self.stream = PublishedStream(model, memory)

    def __len__(self) -> int:
        return len(self.trace)

    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        compare_state(report, "initial state", self.stream, self.trace.initial)
        before = self.trace.initial
        for step in self.trace:
            if reset:
                self.stream.adopt(before)
            before = step.after
            _play(step, self.stream, report)
            yield


def _play(step: Step, stream: PublishedStream, report: CaseReport) -> None:
    where = f"step {step.index} ({step.kind})"
    draw = Permutations(step.randperm)
    if step.kind == "merge":
        stream.merge()
    elif step.kind == "inject":
        delta = step.inputs.get("delta_memory")
        made = stream.inject(_given(step, "input_ids"), delta, bool(step.args.get("update_memory")), draw)
        report.measure("new tokens", where, made, _recorded(step, "delta_memory"))
    else:
        heard = _read(step, stream, draw)
        _compare_read(step, where, heard, report)
        if "stm_retriever_weights" in step.outputs and heard.hidden_states is not None:
            scores = stream.pool_scores(heard.hidden_states)
            report.measure("scores", f"{where}, pool", scores, step.outputs["stm_retriever_weights"])
    report.demand("permutations", where, len(draw), 0)
    compare_state(report, where, stream, step.after)


def _read(step: Step, stream: PublishedStream, draw: Permutations) -> Heard:
    if step.kind == "decode":
        return stream.decode([_given(step, f"input_ids_{i}") for i in range(len(step.inputs))])
    ids = _given(step, "input_ids")
    if step.kind == "generate":
        return stream.generate(ids, _recorded(step, "sequences").shape[1] - ids.shape[1])
    delta = step.inputs.get("delta_memory")
    if delta is None:
        return stream.forward(ids)
    if step.args.get("cat_to_maximum_memory"):
        return stream.forward_with_pool(ids, delta, draw)
    return stream.forward_with_block(ids, delta)


def _given(step: Step, name: str) -> Tensor:
    if name not in step.inputs:
        raise CheckpointError(f"step {step.index} ({step.kind}) must have an input {name!r}, which is missing")
    return step.inputs[name].to(torch.int64)


def _recorded(step: Step, name: str) -> Tensor:
    if name not in step.outputs:
        raise CheckpointError(f"step {step.index} ({step.kind}) must have an output {name!r}, which is missing")
    return step.outputs[name]


# ---------------------------------------------------------------- comparing


def _compare_read(step: Step, where: str, heard: Heard, report: CaseReport) -> None:
    names = [f"logits_{i}" for i in range(len(heard.logits))] if step.kind == "decode" else ["logits"]
    for name, logits in zip(names, heard.logits, strict=True):
        report.measure("logits", where, logits, _recorded(step, name))
    if heard.hidden_states is not None:
        report.measure("hidden states", where, heard.hidden_states, _recorded(step, "hidden_states"))
    if heard.sequences is not None:
        report.demand("generated tokens", where, heard.sequences, _recorded(step, "sequences"))
    _compare_retrieval(report, where, heard.found, step.retrieval)


def _compare_retrieval(
    report: CaseReport, where: str, found: tuple[Found, ...], recorded: RecordedRetrieval | None
) -> None:
    """Compare what every layer fetched."""
    if recorded is None and not found:
        return
    modes = () if recorded is None else recorded.modes
    report.demand("retrieved ids", where, tuple(one.mode for one in found), modes)
    if recorded is None or len(found) != len(recorded.modes):
        return
    for layer, one in enumerate(found):
        place = f"{where}, layer {layer}"
        report.demand("retrieved ids", place, one.ids, recorded.ids[layer])
        report.measure("LTM", f"{place}, retrieved", one.retrieved.rows.need_hidden(), recorded.values[layer])
        report.measure("ages", f"{place}, retrieved", one.ages, recorded.ages[layer])
        scores = recorded.scores[layer]
        if scores is not None and len(one.retrieved.scores) and int(one.ids.max()) < len(scores):
            report.measure("scores", place, one.retrieved.scores, scores[one.ids])


def compare_state(report: CaseReport, where: str, stream: PublishedStream, recorded: Recorded) -> None:
    """Compare a whole memory."""
    state = stream.state
    if recorded.memory_ages is None:
        report.demand("counters", where, len(state.stm[0]) > 0, recorded.initialized)
    if not recorded.initialized:
        return
    writes = int(state.counters["writes_since_merge"]) if state.counters else 0
    report.demand("counters", where, writes * stream.engine.config.memory_tokens_per_chunk, recorded.update_step)
    for layer in stream.layers:
        place = f"{where}, layer {layer}"
        report.measure("memory", place, state.stm[layer].need_hidden(), recorded.memory[layer])
        if recorded.memory_ages is not None:
            report.measure("ages", f"{place}, pool", -1 - state.stm[layer].birth, recorded.memory_ages[layer])
            _compare_long_term(report, place, stream, layer, recorded)
            _compare_pending(report, f"{place}, waiting", stream, layer, recorded)


def _compare_long_term(report: CaseReport, place: str, stream: PublishedStream, layer: int, recorded: Recorded) -> None:
    rows = stream.store.gather(layer, stream.store.ids(layer))
    report.measure("LTM", place, rows.need_hidden(), recorded.ltm[layer])
    report.measure("ages", place, stream.state.clock - 1 - rows.birth, recorded.ltm_ages[layer])
    if rows.key is not None:
        report.measure("keys", place, rows.key, recorded.ltm_keys[layer])
    if rows.expiry is not None:
        frequencies = recorded.ltm_recall_frequencies[layer]
        left = rows.expiry - stream.state.counters["decayed"][layer]
        report.demand("recall frequencies", place, left.to(frequencies.dtype), frequencies)


def _compare_pending(report: CaseReport, place: str, stream: PublishedStream, layer: int, recorded: Recorded) -> None:
    rows = stream.state.pending[layer]
    if recorded.pending is None or recorded.pending_keys is None or recorded.pending_ages is None:
        report.demand("counters", place, len(rows), 0)
        return
    report.measure("LTM", place, rows.need_hidden(), recorded.pending[layer])
    report.measure("ages", place, stream.state.clock - 1 - rows.birth, recorded.pending_ages[layer])
    if rows.key is not None:
        report.measure("keys", place, rows.key, recorded.pending_keys[layer])
