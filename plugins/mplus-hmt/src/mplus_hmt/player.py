"""HMTPlayer: traces of the published code of HMT, replayed through a memory's own write, read, save, load, generate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import define
from torch import Tensor
from torch.nn import functional

import mplus
from mplus.interop.golden import TracePlayer
from mplus.interop.report import CaseReport, ErrorScale
from mplus.training.decoder import make_streams
from mplus_hmt.case import HMTCase, Step, published_name
from mplus_hmt.mechanism import HMTMechanism
from mplus_hmt.passes import remembered, summarised
from mplus_hmt.recall import Recalled, recall, retrieval_loss, side_by_side_lists

RETRIEVAL_WEIGHT = 0.05
"""Of the retrieval loss in the published loss."""


class HMTPlayer(TracePlayer):
    """Plays a case of HMT.

    Segments of a forward are read (their logits) and then written (their memory vector), and the memory is saved and
    loaded once on the way; with gradients, streams of training do the same. Only texts with padding, which cannot be
    written, go through the passes themselves.
    """

    tolerance: ClassVar[float] = 1e-5
    tolerances: ClassVar[Mapping[str, float]] = {"recall in bfloat16": 3e-2}
    error_scale: ClassVar[ErrorScale] = "tensor"
    quantities = (
        "topic summary",
        "recall scores",
        "recalled prompt",
        "memory vector",
        "memory list",
        "logits",
        "loss",
        "gradients",
        "recall in bfloat16",
        "distance",
        "generated tokens",
    )

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        super().__init__(folder, backend, dtype)
        self.case = HMTCase.read(folder)
        self._decoders: dict[tuple[float, bool, bool], Any] = {}

    def __len__(self) -> int:
        return len(self.case.steps)

    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        """Replay every step; each begins with an empty list in the published code too, so ``reset`` changes nothing."""
        for step in self.case.steps:
            found = Compared(report, f"step {step.index} ({step.kind})")
            if step.kind == "generate":
                self._generate(step, found)
            elif step.kind == "recall_bf16":
                self._recall_bf16(step, found)
            elif not bool(step.inputs["attention_mask"].all()):
                self._padded(step, found)
            elif step.args["gradients"]:
                self._gradients(step, found)
            else:
                self._forward(step, found)
            yield

    def model(self, summary: float = 0.5, *, recalls: bool = True, halved: bool = False) -> Any:
        """Return the decoder with these options, made once."""
        key = (summary, recalls, halved)
        if key not in self._decoders:
            options = {"summary": summary, "recall": recalls, "halved_summary": halved}
            self._decoders[key] = self.case.decoder(self.backend, self.dtype, **options)
        return self._decoders[key]

    # ------------------------------------------------------------------ the kinds of steps

    @torch.no_grad()
    def _forward(self, step: Step, found: Compared) -> None:
        """Read and write segment by segment."""
        model = self.model(step.args["sum_fraction"], recalls=step.args["recall"])
        memory, logits, recalled = model.new_memory(len(step.inputs["input_ids"])), [], None
        for number, segment in enumerate(step.segments):
            ids, at = segment["input_ids"].long(), found.at(f"segment {number}")
            if segment.get("memory_list_before") is not None:
                at.near("memory list", _lists(memory), segment["memory_list_before"])
            recalled = self._recalled(model, memory, ids, at, segment)
            logits.append(model(ids, memory=memory).logits)
            at.near("logits", logits[-1], segment["logits"])
            memory.write(list(ids))
            at.near("memory vector", _lists(memory)[:, -1:], segment["memory_embedding"])
            if number == 1:
                memory = _saved_and_loaded(memory, model)
        if step.args["recall"]:
            found.near("memory list", _lists(memory), step.outputs["memory_list"])
        scores = None if recalled is None else recalled.scores
        self._compare_outputs(step, logits, scores, found)

    def _gradients(self, step: Step, found: Compared) -> None:
        """Read and write with gradients, as training does, and go back through all of it."""
        model = self.model(step.args["sum_fraction"], recalls=step.args["recall"])
        model.requires_grad_(True)
        model.zero_grad()
        streams = make_streams(model.mplus_engine, range(len(step.inputs["input_ids"])), seed=0)
        logits = []
        for number, segment in enumerate(step.segments):
            ids = segment["input_ids"].long()
            logits.append(streams.read(ids[:, None]).logits[:, 0])
            found.at(f"segment {number}").near("logits", logits[-1], segment["logits"])
            streams.write(ids, torch.zeros(len(ids), dtype=torch.int64))
        loss = self._compare_outputs(step, logits, None, found)
        loss.backward()
        gradients = {published_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        recorded = step.outputs["gradients"]
        for name in sorted(gradients.keys() | recorded.keys()):
            nothing = torch.zeros_like(gradients.get(name, recorded.get(name)))
            found.at(name).near("gradients", gradients.get(name, nothing), recorded.get(name, nothing))
        model.requires_grad_(False)

    @torch.no_grad()
    def _padded(self, step: Step, found: Compared) -> None:
        """Run the passes of every segment with the mask of its padding."""
        model, size = self.model(step.args["sum_fraction"]), self.case.sizes["segment_size"]
        parts, decoder = model.mplus, model.mplus_engine.decoder
        listed: list[Tensor] = []
        logits, sensory = [], torch.empty(len(step.inputs["input_ids"]), 0, dtype=torch.int64)
        masks = step.inputs["attention_mask"].bool().split(size, 1)
        count = round(step.args["sum_fraction"] * size)
        for number, (segment, mask) in enumerate(zip(step.segments, masks, strict=True)):
            ids, at = segment["input_ids"].long(), found.at(f"segment {number}")
            text, recalled = decoder.embed(ids), Recalled(parts.first_prompts(ids.to(self.dtype)))
            summary = summarised(decoder, parts.topic, text, mask, count, "read", padding_counts=True)
            at.near("topic summary", summary, segment["summary"])
            if listed:
                lists = list(torch.cat(listed[-self.case.sizes["ltm_context"] :], 1))
                recalled = recall(parts, summary, *side_by_side_lists(lists))
                at.recall(recalled, segment)
            whole = remembered(decoder, recalled.prompt, decoder.embed(sensory), text, "write", mask)
            before = 1 + sensory.shape[1]
            logits.append(model.get_output_embeddings()(whole[:, before:-1]))
            at.near("logits", logits[-1], segment["logits"])
            at.near("memory vector", whole[:, -1:], segment["memory_embedding"])
            listed.append(whole[:, -1:])
            sensory = ids[:, ids.shape[1] - min(self.case.sizes["num_sensory"], ids.shape[1]) :]
        found.near("memory list", torch.cat(listed[-self.case.sizes["ltm_context"] :], 1), step.outputs["memory_list"])
        self._compare_outputs(step, logits, None, found)

    @torch.no_grad()
    def _generate(self, step: Step, found: Compared) -> None:
        """Write all segments but the last one, and let the decoder go on behind that."""
        model, outputs = self.model(halved=True), step.outputs
        *before, last = step.inputs["input_ids"].long().split(self.case.sizes["segment_size"], 1)
        memory = model.new_memory(len(last))
        for ids in before:
            memory.write(list(ids))
        memory = _saved_and_loaded(memory, model)
        if before:
            found.near("memory list", _lists(memory), outputs["memory_list"])
        self._recalled(model, memory, last, found, outputs)
        new = step.args["max_new_tokens"]
        made = model.generate(
            last,
            attention_mask=torch.ones_like(last),
            memory=memory,
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.near("logits", torch.stack(made.logits, 1), outputs["logits"])
        found.report.demand("generated tokens", found.where, made.sequences[:, last.shape[1] :], outputs["sequences"])

    @torch.no_grad()
    def _recall_bf16(self, step: Step, found: Compared) -> None:
        lists = step.inputs["memory_list"]
        summary = step.inputs["summary"]
        lengths = torch.full((len(lists),), lists.shape[1])
        recalled = recall(self.model().mplus, summary, lists, lengths, dtype=torch.bfloat16)
        found.near("recall in bfloat16", recalled.prompt, step.outputs["recalled"])

    # ------------------------------------------------------------------ comparing

    def _recalled(
        self, model: Any, memory: mplus.Memory, ids: Tensor, at: Compared, recorded: Mapping[str, Any]
    ) -> Recalled:
        """Compare the recall that a segment is read behind."""
        mechanism: HMTMechanism = model.mplus_engine.mechanism
        decoder, views = model.mplus_engine.decoder, memory.streams.versioned_snapshot()[1]
        text = decoder.embed(ids)
        recalled = mechanism.recalled(decoder, views, text, adapter="read")
        if mechanism.additions.topic is not None and recorded.get("summary") is not None:
            summary = summarised(decoder, mechanism.additions.topic, text, None, mechanism.summary_tokens, "read")
            at.near("topic summary", summary, recorded["summary"])
        at.recall(recalled, recorded)
        return recalled

    def _compare_outputs(self, step: Step, logits: Sequence[Tensor], scores: Tensor | None, found: Compared) -> Tensor:
        """Compare what a forward returned, and return its loss."""
        outputs, most = step.outputs, self.case.sizes["num_seg_save"]
        whole, labels = torch.cat(list(logits), 1), step.inputs["labels"].long()
        found.near("logits", torch.cat(list(logits[-most:]), 1), outputs["logits"])
        scored = min(step.args["mask_size"], labels.shape[1] - 1)
        text = functional.cross_entropy(whole[:, :-1][:, -scored:].flatten(0, 1), labels[:, -scored:].flatten())
        found.near("loss", text.exp().log(), torch.tensor(outputs["perplexity"]).log())
        loss = text
        if step.inputs["positives"] is not None and scores is not None:
            positives = step.inputs["positives"][:, : scores.shape[2]].to(scores)
            term = retrieval_loss(scores[:, 0], positives, twice=True)
            found.near("loss", term, torch.tensor(outputs["retrieval_loss"]))
            loss = loss + RETRIEVAL_WEIGHT * term
        found.near("loss", loss, torch.tensor(outputs["loss"]))
        return loss


@define(frozen=True, eq=False)
class Compared:
    """Where in a trace something is compared.

    Attributes:
        report: of the case.
        where: step and segment.
    """

    report: CaseReport
    where: str

    def at(self, place: str) -> Compared:
        """Return a place within this one."""
        return Compared(self.report, f"{self.where}, {place}")

    def near(self, quantity: str, ours: Tensor, recorded: Tensor) -> None:
        """Note the largest difference of two tensors."""
        self.report.measure(quantity, self.where, ours, recorded)

    def recall(self, recalled: Recalled, recorded: Mapping[str, Any]) -> None:
        """Compare a recall with what a segment recorded of it."""
        if recorded.get("recalled") is not None and recalled.scores is not None:
            self.near("recall scores", recalled.scores, recorded["recall_scores"])
            self.near("recalled prompt", recalled.prompt, recorded["recalled"])
        if recorded.get("prompt") is not None:
            self.near("recalled prompt", recalled.prompt, recorded["prompt"])
        if recorded.get("distance") is not None and recalled.scores is not None:
            length = recalled.scores.shape[2]
            ours = length - recalled.scores[:, 0].argmax(-1)
            self.report.demand("distance", self.where, ours, torch.tensor(recorded["distance"]))


def _lists(memory: mplus.Memory) -> Tensor:
    """Return the lists of memory vectors of all streams, ``[B, m, w]``."""
    return torch.stack([store.gather(0, store.ids(0)).need_hidden() for store in memory.stores])


def _saved_and_loaded(memory: mplus.Memory, model: Any) -> mplus.Memory:
    with tempfile.TemporaryDirectory(prefix="mplus-hmt-") as folder:
        memory.save(Path(folder) / "memory")
        return mplus.Memory.load(Path(folder) / "memory", model)
