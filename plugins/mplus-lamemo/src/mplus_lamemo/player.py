"""LaMemoPlayer: traces of the published code of LaMemo, replayed with the functions that the mechanism shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from mplus.errors import CheckpointError
from mplus.interop.golden import STEPS, TracePlayer, read_json
from mplus.interop.report import CaseReport, ErrorScale
from mplus_lamemo.attention import Attention
from mplus_lamemo.published import Carried, LayerResult, PublishedDecoder

CONFIG, WEIGHTS, TENSORS = "config.json", "state_dict.safetensors", "trace.safetensors"


class LaMemoPlayer(TracePlayer):
    """Plays a case of LaMemo, whose tensors have time first, in the published decoder."""

    tolerance: ClassVar[float] = 1e-5
    error_scale: ClassVar[ErrorScale] = "tensor"
    quantities = (
        "text output",
        "memory output",
        "text attention",
        "look-ahead attention",
        "weight of what was carried",
        "carried vectors",
        "log-sum-exp",
        "embeddings",
        "logits",
        "loss",
        "gradients",
    )

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        super().__init__(folder, backend, dtype)
        try:
            weights, self._tensors = load_file(folder / WEIGHTS), load_file(folder / TENSORS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} must hold complete {WEIGHTS} and {TENSORS}: {error}") from error
        steps, sizes = read_json(folder / STEPS).get("steps"), read_json(folder / CONFIG)
        if not isinstance(steps, list) or sizes.get("attn_type") != 3:
            raise CheckpointError(f"{folder} must be a golden trace of LaMemo with attn_type 3")
        self.steps: Sequence[Mapping[str, Any]] = steps
        self.decoder = PublishedDecoder(sizes, {name: weight.to(dtype) for name, weight in weights.items()})

    def __len__(self) -> int:
        return len(self.steps)

    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        memory: Carried | None = None
        recorded: Mapping[str, Any] | None = None
        try:
            for step in self.steps:
                before = self._recorded_state(recorded) if reset and recorded is not None else memory
                memory = self._step(step, report, before)
                recorded = step.get("state_after")
                self._compare_state(report, step, memory)
                yield
        except KeyError as error:
            raise CheckpointError(f"{self.folder} must be a golden trace of LaMemo, and lacks {error}") from error

    def _step(self, step: Mapping[str, Any], report: CaseReport, before: Carried | None) -> Carried | None:
        """Do one step; return the memory after it, None where that is empty."""
        if step["kind"] == "reset":
            return None
        ids = self._tensor(step["inputs"]["ids"]).long().T
        memory = self.decoder.empty(len(ids)) if before is None else before
        where = f"step {step['index']} ({step['kind']})"
        if step["kind"] == "gradient":
            self._gradients(step, report, where, ids, memory)
            return before
        with torch.no_grad():
            layers, after = self.decoder.segment(ids, memory)
            logits = self.decoder.logits(layers[-1].text)
        for number, layer in enumerate(layers):
            self._compare_layer(report, f"{where}, layer {number}", layer, step["outputs"]["layers"][number])
        outputs = step["outputs"]
        if step["kind"] == "next_token":
            report.measure("logits", where, logits[:, -1], self._tensor(outputs["next_logits"]))
            return after
        report.measure("logits", where, logits.transpose(0, 1), self._tensor(outputs["logits"]))
        report.measure("loss", where, self._losses(step, logits), self._tensor(outputs["nll"]))
        return after

    def _losses(self, step: Mapping[str, Any], logits: Tensor) -> Tensor:
        """Return the loss ``[q, B]`` of each target."""
        targets = self._tensor(step["inputs"]["targets"]).long()
        return functional.cross_entropy(logits.permute(1, 2, 0), targets, reduction="none")

    def _gradients(self, step: Mapping[str, Any], report: CaseReport, where: str, ids: Tensor, memory: Carried) -> None:
        named = {name: weight.detach().requires_grad_(True) for name, weight in self.decoder.named.items()}
        decoder = PublishedDecoder(self.decoder.sizes, named)
        layers, _ = decoder.segment(ids, memory)
        loss = self._losses(step, decoder.logits(layers[-1].text)).mean()
        report.measure("loss", where, loss, torch.tensor(step["outputs"]["loss"]))
        loss.backward()
        for name, recorded in step["outputs"]["gradients"].items():
            found = named[name].grad
            ours = torch.zeros_like(named[name]) if found is None else found
            report.measure("gradients", f"{where}, {name}", ours, self._tensor(recorded))

    # ------------------------------------------------------------------ comparing

    def _compare_layer(self, report: CaseReport, where: str, layer: LayerResult, recorded: Mapping[str, Any]) -> None:
        ours = {
            "text output": ("text_out", layer.text.transpose(0, 1)),
            "memory output": ("memory_out", layer.memory.transpose(0, 1)),
            "text attention": ("text_attention", layer.text_weights.permute(2, 3, 0, 1)),
        }
        if layer.ahead_weights is not None and layer.alpha is not None:
            ours["look-ahead attention"] = ("lookahead_attention", layer.ahead_weights.permute(2, 3, 0, 1))
            ours["weight of what was carried"] = ("alpha", layer.alpha.permute(2, 0, 1))
        for quantity, (name, found) in ours.items():
            if recorded[name] is not None:
                report.measure(quantity, where, found, self._tensor(recorded[name]))

    def _compare_state(self, report: CaseReport, step: Mapping[str, Any], memory: Carried | None) -> None:
        recorded, where = step.get("state_after"), f"step {step['index']} ({step['kind']})"
        if recorded is None or memory is None:
            return
        report.measure("embeddings", where, memory.embeddings.transpose(0, 1), self._tensor(recorded["embeddings"]))
        for number, one in enumerate(memory.attention):
            place = f"{where}, layer {number}"
            report.measure(
                "carried vectors", place, one.vectors.permute(2, 0, 1, 3), self._at(recorded, "carried", number)
            )
            report.measure("log-sum-exp", place, one.mass.permute(2, 0, 1), self._at(recorded, "lse", number))

    def _recorded_state(self, recorded: Mapping[str, Any]) -> Carried:
        """Return the memory that was recorded after a step."""
        layers = range(len(recorded["carried"]))
        return Carried(
            self._tensor(recorded["embeddings"]).transpose(0, 1).to(self.dtype),
            tuple(
                Attention(
                    self._at(recorded, "carried", layer).permute(1, 2, 0, 3).to(self.dtype),
                    self._at(recorded, "lse", layer).permute(1, 2, 0).to(self.dtype),
                )
                for layer in layers
            ),
        )

    def _at(self, recorded: Mapping[str, Any], name: str, layer: int) -> Tensor:
        return self._tensor(recorded[name][layer])

    def _tensor(self, name: str) -> Tensor:
        return self._tensors[name]
