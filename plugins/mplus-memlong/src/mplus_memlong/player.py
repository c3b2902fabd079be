"""MemLongPlayer: traces of the released code of MemLong, replayed with variant "published"."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import define, evolve, field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import mplus
from mplus.errors import CheckpointError
from mplus.hf.reading.override import WrappedMechanism, reading_as
from mplus.interop.golden import STEPS, TracePlayer, read_json
from mplus.interop.report import CaseReport, ErrorScale
from mplus.mechanisms.decoder import Decoder, Text
from mplus.mechanisms.opened import Opened
from mplus.memory.state import StreamState, StreamView
from mplus.rows import MemoryRows
from mplus_memlong.published import wrapped
from mplus_memlong.reading import ReadGroups
from mplus_memlong.state import MemLongState

OVERFLOW = (
    "the local cache is full: the released code moves its older half to the bank, under the text of the first tokens "
    "of the whole past; a key/value cache of transformers does not give away half of what it holds"
)
ULPS = ("bank (units in the last place)", "retrieved rows (units in the last place)")
"""Of banks in half precision."""


@define(eq=False)
class TableEncoder:
    """The stand-in for a text encoder that traces were made with: the mean of table rows, of length 1.

    Attributes:
        table: ``[V, v]``.
        most: tokens of a query, the last ones.
        in_front: ``[B, n]`` int64, text in front of every query: while decoding, that of pieces that the cache lacks.
        asked: ``[B, v]``, the last queries.
    """

    table: Tensor
    most: int
    in_front: Tensor | None = None
    asked: Tensor = field(factory=lambda: torch.empty(0))

    def groups(self, ids: Sequence[Tensor], hidden: Tensor, tokenizer: Any) -> Tensor:
        return torch.stack([self._mean(one) for one in ids])

    def queries(self, ids: Sequence[Tensor], decoder: Decoder, tokenizer: Any) -> Tensor:
        if self.in_front is not None:
            ids = [torch.cat(pair)[-self.most :] for pair in zip(self.in_front, ids, strict=True)]
        self.asked = torch.stack([self._mean(one) for one in ids])
        return self.asked

    def compared(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries

    def _mean(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.table[ids].mean(0), dim=-1).float()


class Watched(WrappedMechanism):
    """Notes what the last pass read.

    Attributes:
        read: None where memories were empty.
    """

    read: ReadGroups | None = None

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Open, and note it."""
        return self._noted(self.inner.open(decoder, views, text))

    def reopen(self, decoder: Decoder, opened: Opened, text: Text, rows: Sequence[int]) -> Opened:
        """Open anew, and note it."""
        return self._noted(self.inner.reopen(decoder, opened, text, rows))

    def _noted(self, opened: Opened) -> Opened:
        self.read = opened.own
        return opened


class MemLongPlayer(TracePlayer):
    """Plays a case of MemLong on a ``LlamaForCausalLM`` with the weights that lie in it.

    A pass of the case is a read by ``forward``, and a ``write`` of the same tokens. The write makes the keys and values
    that the released code caught during the read, since no layer below the memory layer reads. Behind a training step
    the memory is saved and loaded.
    """

    quantities: ClassVar[tuple[str, ...]] = (
        *("logits", "hidden states", "attention", "loss", "gradients", "queries", "retrieved rows", "bank", "keys"),
        *ULPS,
        *("retrieved ids", "tokens", "lengths", "local cache"),
    )
    tolerances: ClassVar[Mapping[str, float]] = dict.fromkeys(ULPS, 1.0)
    error_scale: ClassVar[ErrorScale] = "entry"

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        super().__init__(folder, backend, dtype)
        plain, self.config = read_json(folder / STEPS), read_json(folder / "config.json")
        self.steps: Any = plain.get("steps")
        if not isinstance(self.steps, list) or plain.get("format") != 1:
            raise CheckpointError(f"{folder / STEPS} must have steps of format 1, got {plain.get('format')!r}")
        self.trace, weights = (_tensors(folder / f"{name}.safetensors") for name in ("trace", "state_dict"))
        self.model, self.mechanism = wrapped(self.config, weights, dtype, backend)
        self.encoder = TableEncoder(weights["retriever_table"], self.mechanism.options.encoder_tokens)
        self.mechanism.encoder = self.encoder
        self.memory: Any = None
        self.cache: Any = None
        self.watched: Any = None

    def __len__(self) -> int:
        return len(self.steps)

    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        before: Mapping[str, Any] | None = None
        for step in self.steps:
            where = f"step {step['index']} ({step['kind']})"
            goes_on = step["kind"] == "decode" and step["args"]["continues"]  # with a cache of the bank as it is
            if reset and before is not None and self.memory is not None and not goes_on:
                self._adopt(before)
            before = step["state_after"]
            if step["kind"] == "reset":
                self.memory = None
                report.demand("tokens", where, 0, step["state_after"]["tokens"])
            elif self._overflows(step):
                report.skip(where, OVERFLOW)
                before = None
            else:
                self._play(report, where, step)
                if step["kind"] == "train":
                    self._go_through_a_file()
                self._compare_state(report, where, step["state_after"])
            yield

    def _overflows(self, step: Mapping[str, Any]) -> bool:
        """Return whether the local cache has given away its older half in this step, or before."""
        if step["kind"] != "decode" or not step["args"]["continues"]:
            return False
        return int(step["local_cache_tokens"]) != int(self.cache.get_seq_length()) + 1

    # ------------------------------------------------------------------ playing

    def _play(self, report: CaseReport, where: str, step: Mapping[str, Any]) -> None:
        ids, passes = self._ids(step["inputs"]["input_ids"]), step["passes"]
        if self.memory is None:
            self.memory = self.model.new_memory(len(ids), seed=0)
        logits, out = [], None
        with self._attention() as attention:
            for number, one in enumerate(passes):
                last = number + 1 == len(passes)
                piece = self._ids(one["input_ids"])
                attention.clear()
                out = self._read(step, ids, piece, last)
                logits.append(out.logits)
                self._compare_pass(report, f"{where}, pass {number}", one, out)
                if step["kind"] != "decode" or not last:
                    self.memory.write(list(piece), source="trace")
        report.measure("logits", where, torch.cat(logits, 1), self._of(step["outputs"]["logits"]))
        for layer, recorded in enumerate(step["last_pass_attention"] or ()):
            report.measure("attention", f"{where}, layer {layer}", attention[layer], self._of(recorded))
        if "local_cache_tokens" in step:
            report.demand("local cache", where, int(self.cache.get_seq_length()), step["local_cache_tokens"])
        if step["kind"] == "train":
            self._compare_gradients(report, where, step, out)

    def _read(self, step: Mapping[str, Any], ids: Tensor, piece: Tensor, last: bool) -> Any:
        """Run one pass, with what the step wants of its last one."""
        decodes, trains = step["kind"] == "decode" and last, step["kind"] == "train" and last
        options: dict[str, Any] = {"memory": self.memory, "output_hidden_states": True, "use_cache": decodes}
        if decodes and step["args"]["continues"]:
            options.update(past_key_values=self.cache, retrieve_every=1)
        else:
            self.encoder.in_front = None  # a piece asks with its own text
        if trains:
            options["labels"] = piece
        with torch.set_grad_enabled(trains), reading_as(self.model, around=self._watch):
            out = self.model(piece, **options)
        if decodes and not step["args"]["continues"]:
            self.encoder.in_front = ids[:, : ids.shape[1] - piece.shape[1]]
        self.cache = out.past_key_values if decodes else self.cache
        return out

    def _go_through_a_file(self) -> None:
        """Go on with what a file gives back of the memory."""
        with tempfile.TemporaryDirectory() as folder:
            self.memory.save(folder)
            self.memory = mplus.Memory.load(folder, self.model)

    def _watch(self, mechanism: Any) -> Any:
        self.watched = Watched(mechanism) if self.watched is None else self.watched
        self.watched.read = None
        return self.watched

    @contextmanager
    def _attention(self) -> Iterator[list[Tensor]]:
        """Collect what attention gives in each layer."""
        found: list[Tensor] = []
        layers = self.model.model.layers
        hooks = [layer.self_attn.register_forward_hook(lambda _, given, out: found.append(out[0])) for layer in layers]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _adopt(self, recorded: Mapping[str, Any]) -> None:
        """Put the recorded bank in the place of our own."""
        keys, values = (self._of(recorded[name]) for name in ("keys", "values"))
        stores = self.memory.stores

        def change(states: list[StreamState]) -> None:
            for row, (state, store) in enumerate(zip(states, stores, strict=True)):
                assert isinstance(state, MemLongState)  # noqa: S101 - of this mechanism
                rows = torch.cat([keys[row].transpose(0, 1).flatten(1), values[row].transpose(0, 1).flatten(1)], -1)
                old = store.gather(0, store.ids(0))
                store.remove(0, store.ids(0))
                store.append(0, old.replace(projected=rows.to(old.columns()["projected"])))
                states[row] = evolve(state, group_key=self._of(recorded["embeddings"])[row])

        self.memory.streams.change(change)

    # ------------------------------------------------------------------ comparing

    def _compare_pass(self, report: CaseReport, where: str, recorded: Mapping[str, Any], out: Any) -> None:
        report.measure("hidden states", where, torch.stack(out.hidden_states), self._of(recorded["hidden_states"]))
        retrieval, read = recorded["retrieval"], self.watched.read
        report.demand("retrieved ids", where, read is None, retrieval is None)
        if read is None or retrieval is None:
            return
        ids = torch.stack([one.groups for one in read.chosen])
        report.demand("retrieved ids", where, ids.int(), self._of(retrieval["ids"]))
        report.measure("queries", where, self.encoder.asked, self._of(retrieval["query"]))
        rows = [view.store.gather(0, read.ids(row)) for row, view in enumerate(read.views)]
        self._compare_rows(report, "retrieved rows", where, rows, retrieval)

    def _compare_state(self, report: CaseReport, where: str, recorded: Mapping[str, Any]) -> None:
        states, stores = self.memory.states, self.memory.stores
        for state, store, lengths in zip(states, stores, recorded["lengths"], strict=True):
            report.demand("tokens", where, store.count(0), recorded["tokens"])
            report.demand("lengths", where, tuple(map(str, state.group_length.tolist())), tuple(map(str, lengths)))
        keys = [state.group_key for state in states]
        embeddings = self._of(recorded["embeddings"])
        report.measure(
            "keys", where, torch.stack(keys) if len({len(one) for one in keys}) == 1 else keys[0], embeddings
        )
        self._compare_rows(report, "bank", where, [store.gather(0, store.ids(0)) for store in stores], recorded)

    def _compare_rows(
        self, report: CaseReport, quantity: str, where: str, rows: Sequence[MemoryRows], recorded: Mapping[str, Any]
    ) -> None:
        """Compare rows with recorded keys and values ``[B, H, n, d]``."""
        found = torch.stack([one.columns()["projected"] for one in rows])
        for name, part in zip(("keys", "values"), found.chunk(2, -1), strict=True):
            expected = self._of(recorded[name])
            ours = part.unflatten(-1, (expected.shape[1], -1)).transpose(1, 2)
            if expected.dtype == torch.float32:
                report.measure(quantity, f"{where}, {name}", ours, expected)
            else:
                distance = _ulps(ours, expected)
                report.measure(f"{quantity} (units in the last place)", f"{where}, {name}", distance, distance * 0)

    def _compare_gradients(self, report: CaseReport, where: str, step: Mapping[str, Any], out: Any) -> None:
        report.measure("loss", where, out.loss[None], self._of(step["outputs"]["loss"]))
        self.model.zero_grad()
        out.loss.backward()
        parameters = dict(self.model.named_parameters())
        for name, recorded in step["gradients"].items():
            if name.endswith("ret_gate.output_gate"):
                turn = self.mechanism.additions.read_layers.index(int(name.split(".")[2]))
                found = parameters["mplus.gate"].grad[turn].view(1, -1, 1, 1)
            else:
                found = parameters[name].grad
            report.measure("gradients", f"{where}, {name}", found, self._of(recorded))

    def _ids(self, name: str) -> Tensor:
        return self._of(name).long()

    def _of(self, name: str) -> Tensor:
        if name not in self.trace:
            raise CheckpointError(
                f"{self.folder / 'trace.safetensors'} must have a tensor {name!r}, which steps refer to"
            )
        return self.trace[name]


def _ulps(ours: Tensor, recorded: Tensor) -> Tensor:
    """Return by how many units in the last place of their dtype numbers differ; infinite where shapes do."""
    if ours.shape != recorded.shape:
        return torch.full(recorded.shape, torch.inf)
    ours, recorded = (
        torch.where(bits < 0, -(bits & 0x7FFF), bits)
        for bits in (part.to(recorded.dtype).contiguous().view(torch.int16).int() for part in (ours, recorded))
    )
    return (ours - recorded).abs().float()


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} must be a complete safetensors file: {error}") from error
