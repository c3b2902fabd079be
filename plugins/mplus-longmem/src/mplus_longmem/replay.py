"""LongMemPlayer: traces of the published code of LongMem, replayed with the variant "published"."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from attrs import define, field
from safetensors.torch import load_file
from torch import Tensor, nn

import mplus
from mplus.errors import CheckpointError
from mplus.interop import CaseReport, TracePlayer
from mplus.interop.golden import read_json
from mplus.interop.report import ErrorScale
from mplus.mechanisms import MemoryRows
from mplus_longmem.bank import Bank, ChunkRead
from mplus_longmem.mechanism import LongMemMechanism

MEASURED = (
    "backbone hidden states", "keys and values", "side hidden states", "joint attention", "queries", "retrieved",
    "logits", "loss", "gradients", "bank", "mean keys",
)  # fmt: skip
EQUAL = ("chunk ids", "chunks", "evicted chunks", "trained parameters", "side network of copies")
IN_UNITS = {name: f"{name} in last places" for name in ("bank", "retrieved")}
"""What comes from a bank in half precision, where a number may round the other way; compared in units of the last place
of that precision."""
SIDE_EPS = 1e-5
BACKBONE = "decoder.pretrained_model.decoder.model."
SIDE = "decoder."


def our_name(name: str) -> str:
    """Return the name that a published parameter has in the wrapped decoder."""
    if name.startswith(BACKBONE):
        return name.removeprefix(BACKBONE).replace(".mlp.", ".")
    if name.endswith(".memory_bias"):
        return "mplus.memory_bias"
    own = name.removeprefix(SIDE).replace("layer_norm.", "final_norm.")
    for published, ours in ((".self_attn.", ".attn."), (".fc1.", ".fc_in."), (".fc2.", ".fc_out.")):
        own = own.replace(published, ours)
    if own.startswith("layers."):
        _, number, rest = own.split(".", 2)
        own = f"layers.{number}.layer.{rest}"
    return f"mplus.{own}"


@define(eq=False)
class Seen:
    """What modules were given and gave in one forward.

    Attributes:
        states: what the side layers and the final norm received.
        joint: ``[B, T, d]``, what the attention of the reading layer gave.
        reads: of each batch row, queries ``[H, T, D]`` and what they read.
    """

    states: list[Tensor] = field(factory=list)
    joint: list[Tensor] = field(factory=list)
    reads: list[tuple[Tensor, ChunkRead]] = field(factory=list)


class LongMemPlayer(TracePlayer):
    """Plays a case of LongMem on the published decoder, through ``write``, ``save``, ``load`` and ``forward``."""

    quantities = (*MEASURED, *EQUAL)
    tolerances: ClassVar[Mapping[str, float]] = dict.fromkeys(IN_UNITS.values(), 1.0)
    error_scale: ClassVar[ErrorScale] = "entry"

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        super().__init__(folder, backend, dtype)
        self.sizes: Mapping[str, Any] = read_json(folder / "config.json")
        plain: Mapping[str, Any] = read_json(folder / "steps.json")
        self.steps: Sequence[Mapping[str, Any]] = plain["steps"]
        self.trained: Sequence[str] = plain["trainable"]
        self.copied = bool(plain["side_init_from_backbone"])
        try:
            self.tensors = load_file(folder / "trace.safetensors")
            weights = load_file(folder / "state_dict.safetensors")
        except OSError as error:
            raise CheckpointError(
                f"{folder} must hold trace.safetensors and state_dict.safetensors: {error}"
            ) from error
        self.weights = {our_name(name): tensor for name, tensor in weights.items()}
        self.model: Any = self._model()
        self.memory: mplus.Memory | None = None

    @property
    def compared(self) -> tuple[str, ...]:
        return tuple(IN_UNITS.get(name, name) if self.bank_dtype is not None else name for name in self.quantities)

    @property
    def bank_dtype(self) -> torch.dtype | None:
        """The half precision that the bank is kept in; None: it is kept as it was made."""
        name: str = self.sizes["bank_dtype"]
        return None if name == "float32" else cast("torch.dtype", getattr(torch, name))

    @property
    def mechanism(self) -> LongMemMechanism:
        """The mechanism of the wrapped decoder."""
        return cast("LongMemMechanism", self.model.mplus_engine.mechanism)

    def __len__(self) -> int:
        return len(self.steps)

    def _model(self) -> Any:
        """Return the published decoder with its side network."""
        from mplus_longmem.backbone import BackboneConfig, BackboneForCausalLM  # with transformers: naming needs it not

        sizes = self.sizes
        config = BackboneConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["embed_dim"],
            num_hidden_layers=sizes["backbone_layers"],
            num_attention_heads=sizes["num_heads"],
            layer_norm_eps=sizes["layer_norm_eps_backbone"],
        )
        decoder: Any = BackboneForCausalLM(config).requires_grad_(False)
        decoder.eval()
        decoder.load_state_dict({name: one for name, one in self.weights.items() if not name.startswith("mplus.")})
        options = {
            "layer": sizes["retrieval_layer_index"],
            "reduction": sizes["layer_reduction_factor"],
            "chunk_size": sizes["chunk_size"],
            "bank_dtype": None if self.bank_dtype is None else sizes["bank_dtype"],
        }
        settings = mplus.MPlusConfig(
            mechanism={"name": "longmem", **options},
            variant="published",
            backend=self.backend,
            chunk_tokens=1024,
            retrieved_tokens=sizes["k"] // sizes["chunk_size"],
            long_term_tokens=sizes["memory_size"] // sizes["chunk_size"],
        )
        return mplus.wrap(decoder.to(self.dtype), settings)

    def _load_side(self, report: CaseReport) -> None:
        """Load the side network; in a case that began with copies, compare these."""
        side, start = self.mechanism.additions, dict(self.model.named_parameters())
        for layer in side.layers:  # the published side layers differ from those of the decoder in these two (L9)
            copy: Any = layer.layer
            copy.ln_1.eps, copy.approximate = SIDE_EPS, "none"
        cast("nn.LayerNorm", side.final_norm).eps = SIDE_EPS
        trained = {our_name(name) for name in self.trained}
        report.demand("trained parameters", "the side network", trained == {n for n in start if "mplus." in n}, True)
        for name in sorted(trained):
            given = self.weights[name].to(self.dtype)
            if self.copied and name != "mplus.memory_bias":
                report.demand("side network of copies", name, start[name], given)
            start[name].data.copy_(given)

    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        self._load_side(report)
        with tempfile.TemporaryDirectory() as folder:
            before: Mapping[str, Any] | None = None
            for step in self.steps:
                if reset and before is not None:
                    self._adopt(before)
                self._step(step, Path(folder), report)
                before = step["state_after"]
                yield

    def _step(self, step: Mapping[str, Any], folder: Path, report: CaseReport) -> None:
        where = f"step {step['index']} ({step['kind']})"
        if step["kind"] == "reset":
            self.memory = None
        else:
            ids = self._tensor(step["inputs"]["input_ids"]).long()
            memory = self._memory(len(ids))
            self._read(step, where, ids, memory, report)
            if step["kind"] == "read_write":
                held = memory.stores[0].count(0)
                memory.write(list(ids))
                memory.save(folder / where)
                self.memory = memory = mplus.Memory.load(folder / where, self.model)
                new = ids.numel() // self.sizes["chunk_size"]
                left = held + new - memory.stores[0].count(0)
                report.demand("evicted chunks", where, left, step["evicted_chunks"])
        self._compare_bank(step["state_after"], where, report)

    def _memory(self, rows: int) -> mplus.Memory:
        if self.memory is None:
            self.memory = self.model.new_memory(rows)
        return self.memory

    def _read(self, step: Mapping[str, Any], where: str, ids: Tensor, memory: mplus.Memory, report: CaseReport) -> None:
        """Read ``ids`` ``[B, T]`` with the memory, and compare all that the step says of it."""
        trains, outputs = step["kind"] == "train", {name: self._tensor(of) for name, of in step["outputs"].items()}
        self.model.zero_grad()
        with torch.set_grad_enabled(trains), self._watched() as seen:
            found = self.model(ids, memory=memory, labels=ids, output_hidden_states=True)
        report.measure("logits", where, found.logits, outputs["logits"])
        report.measure("backbone hidden states", where, torch.stack(found.hidden_states), outputs["backbone_hidden"])
        report.measure("side hidden states", where, torch.stack(seen.states), outputs["side_hidden"])
        report.measure("joint attention", where, seen.joint[0], outputs["joint_attention"])
        engine, layer = self.model.mplus_engine, self.mechanism.additions.plan.bank_layer
        with torch.no_grad():
            projected = engine.decoder.project(layer, engine.decoder.run(ids, collect={"inputs"}).inputs[layer])
        for name, part in zip(("bank_k", "bank_v"), projected.chunk(2, -1), strict=True):
            report.measure("keys and values", where, part, outputs[name])
        self._compare_reads(step["retrieval"], where, seen, report)
        if trains:
            report.measure("loss", where, found.loss[None], outputs["loss"])
            found.loss.backward()
            own = dict(self.model.named_parameters())
            for name, gradient in step["gradients"].items():
                report.measure("gradients", f"{where}, {name}", own[our_name(name)].grad, self._tensor(gradient))
            frozen = [name for name, one in own.items() if one.grad is not None and not name.startswith("mplus.")]
            report.demand("trained parameters", where, tuple(frozen), ())

    @contextmanager
    def _watched(self) -> Iterator[Seen]:
        """Take note of what the modules of the side network are given and give."""
        seen, side = Seen(), self.mechanism.additions
        reader: Any = side.layers[side.plan.reader]
        with ExitStack() as hooked:
            for module in (*side.layers, side.final_norm):
                handle = module.register_forward_pre_hook(lambda module, given: seen.states.append(given[0]))
                hooked.callback(handle.remove)
            handle = reader.layer.attn.out_proj.register_forward_hook(lambda *found: seen.joint.append(found[2]))
            hooked.callback(handle.remove)
            handle = side.search.register_forward_hook(lambda *found: seen.reads.append((found[1][0], found[2])))
            hooked.callback(handle.remove)
            yield seen

    def _compare_reads(self, recorded: Mapping[str, str] | None, where: str, seen: Seen, report: CaseReport) -> None:
        report.demand("chunk ids", where, len(seen.reads) > 0, recorded is not None)
        if recorded is None or not seen.reads:
            return
        queries = torch.stack([queries.transpose(0, 1).flatten(1) for queries, _ in seen.reads])
        places = torch.stack([read.places.transpose(0, 1) for _, read in seen.reads])
        report.measure("queries", where, queries, self._tensor(recorded["query"]))
        report.demand("chunk ids", where, places, self._tensor(recorded["ids"]))
        for name in ("keys", "values"):
            last = torch.stack([getattr(read, name)[:, -1] for _, read in seen.reads])
            self._measure_kept(report, "retrieved", f"{where}, {name}", last, self._tensor(recorded[name]))

    def _compare_bank(self, recorded: Mapping[str, Any], where: str, report: CaseReport) -> None:
        stores = [] if self.memory is None else self.memory.stores
        report.demand("chunks", where, stores[0].count(0) if stores else 0, recorded["chunks"])
        for row, store in enumerate(stores):
            bank, place = Bank.of(store, 1), f"{where}, row {row}"
            heads = self.mechanism.additions.search.heads
            for name, ours in zip(("keys", "values"), heads.split(bank.rows()), strict=True):
                of_heads = ours.transpose(0, 1)
                self._measure_kept(report, "bank", f"{place}, {name}", of_heads, self._tensor(recorded[name]))
            means = bank.means.unflatten(-1, (heads.keys, -1)).transpose(0, 1)
            report.measure("mean keys", place, means, self._tensor(recorded["index"]))

    def _measure_kept(self, report: CaseReport, name: str, where: str, ours: Tensor, recorded: Tensor) -> None:
        if self.bank_dtype is None or ours.shape != recorded.shape:
            report.measure(name, where, ours, recorded)
            return
        kept = torch.finfo(self.bank_dtype)
        unit = kept.eps * 2 ** recorded.double().abs().clamp(min=kept.tiny).log2().floor()
        apart = (ours.double() - recorded.double()) / unit
        report.measure(IN_UNITS[name], where, apart, torch.zeros_like(apart))

    def _adopt(self, recorded: Mapping[str, Any]) -> None:
        """Go on with the recorded bank."""
        if self.memory is None:
            return
        heads, count = self.mechanism.additions.search.heads, int(recorded["chunks"])
        self.memory = self.model.new_memory(len(self.memory.stores))
        keys, values, means = (self._tensor(recorded[name]) for name in ("keys", "values", "index"))
        rows = torch.cat([part.transpose(0, 1).flatten(1) for part in (keys, values)], -1)
        born = torch.arange(count) - count  # a new stream's clock stands at 0
        for store in self.memory.streams.stores:
            layout = store.layout
            made = MemoryRows(
                None,
                born,
                torch.zeros_like(born),
                key=means.transpose(0, 1).flatten(1).to(layout.key_dtype),
                projected=rows.to(layout.dtype),
                extra={"tokens": torch.full((count,), heads.tokens, dtype=torch.int32)},
            )
            store.append(0, made)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder / 'trace.safetensors'} must hold {name!r}, which is missing")
        return self.tensors[name]
