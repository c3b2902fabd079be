"""The engine behind a wrapped decoder's memories: write passes, retriever keys, fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from attrs import define, evolve
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.config import MPlusConfig
from mplus.errors import MemoryMismatchError, NotSupported
from mplus.hf.adapters.fingerprint import fingerprint
from mplus.hf.adapters.weights import Look, Watch
from mplus.hf.model.modes import bring_back, input_device
from mplus.hf.reading.open_readings import OpenReadings
from mplus.hf.reading.prefix_cache import Prepared
from mplus.hf.retrofit.attention import BASES, PREFIX
from mplus.hf.retrofit.attention_probe import OwnAttention
from mplus.hf.retrofit.context import Marks, Pass, Prefix, PrefixSource, Project, run_in
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.hooks import Retrofit
from mplus.hf.retrofit.projection import Projection
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.short_term.mechanism import RowMechanism, WritePlan
from mplus.mechanisms.short_term.state import ShortTermState
from mplus.memory.memory import Memory
from mplus.memory.state import StreamState
from mplus.memory.weights_state import WeightsState
from mplus.retrievers.base import Retriever
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout


class DecoderEngine:
    """One wrapped decoder, seen from its memories (see ``mplus.memory.engine.Engine``).

    Attributes:
        model: the wrapped decoder.
        config: its memory configuration.
        retrofit: how memory gets into its attention.
        mechanism: the rules of its memories.
        projection: how rows are kept projected, or why they cannot be.
        readings: the blocks of ``model.reading`` that are open.
    """

    def __init__(self, model: nn.Module, config: MPlusConfig, retrofit: Retrofit, mechanism: MemoryMechanism) -> None:
        self.model = model
        self.config = config
        self.retrofit = retrofit
        self.mechanism = mechanism
        self.projection: Projection | str = "the decoder was wrapped without a self-check"
        self.own_attention = OwnAttention(self)
        self.watch = Watch(self)
        self._prepared: WeakKeyDictionary[Memory, Prepared] = WeakKeyDictionary()
        self.readings = OpenReadings()

    def __getstate__(self) -> dict[str, Any]:
        own = ("watch", "_prepared", "readings")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, watch=Watch(self), _prepared=WeakKeyDictionary(), readings=OpenReadings())

    @property
    def embedding(self) -> nn.Module:
        """The decoder's token embedding."""
        model: Any = self.model
        return model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where input ids go, and by default the rows of memories."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of hidden states, hence of memory rows."""
        begin: Tensor = self.mechanism.additions.begin
        return begin.dtype

    @property
    def vocab_size(self) -> int:
        weight: Any = self.embedding.weight
        return int(weight.shape[0])

    @property
    def memory_rows(self) -> Literal["projected", "hidden", "both"]:
        """What new memories keep of a row, by the config; see ``MPlusConfig.memory_rows``."""
        wanted = self.config.memory_rows
        if wanted != "auto":
            return wanted
        hidden = self.mechanism.additions.begin.shape[2]
        smaller = isinstance(self.projection, Projection) and self.projection.size < hidden
        if not smaller or self.config.variant == "published":
            return "hidden"
        # Keys and values are bound to the adapters they were made with, hidden states are not.
        return "hidden" if self.watch.has_adapters_of_user() else "projected"

    @property
    def layout(self) -> StoreLayout:
        return self.layout_of(self.memory_rows)

    def layout_of(self, memory_rows: Literal["projected", "hidden", "both"]) -> StoreLayout:
        """The layout of memories that keep this of a row. Raises NotSupported where rows cannot be projected."""
        size = 0
        if memory_rows != "hidden":
            if isinstance(self.projection, str):
                raise NotSupported(
                    f"memory_rows={memory_rows!r} cannot be had with {type(self.model).__name__}: {self.projection}; "
                    "use 'hidden' or 'auto'"
                )
            size = self.projection.size
        begin = self.mechanism.additions.begin
        return StoreLayout(
            projected_size=size,
            keeps_hidden=memory_rows != "projected",
            layers=begin.shape[0],
            hidden_size=begin.shape[2],
            key_size=self.mechanism.key_size,
            expiry=self.mechanism.expiry,
            dtype=begin.dtype,
            device=self.device,
        )

    def bring_additions(self) -> None:
        """Have what mplus added at hand. Raises NotSupported when it has no values.

        It is looked at outside of any ``forward``, so accelerate, which may have offloaded it, would not bring it.
        """
        additions = getattr(self.model, "mplus", None)
        if additions is not None:
            bring_back(additions, f"what mplus.wrap added to {type(self.model).__name__} (model.mplus)")

    def new_state(self, layout: StoreLayout) -> StreamState:
        """See ``Engine.new_state``."""
        self.bring_additions()
        return evolve(self.mechanism.new_state(layout, self), weights=self.weights())

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        """See ``Engine.project``."""
        if isinstance(self.projection, str):
            raise NotSupported(f"rows cannot be kept projected in {type(self.model).__name__}: {self.projection}")
        begin = self.mechanism.additions.begin
        return self.projection.rows(layer, hidden.to(begin.device)).to(hidden.device)

    def refresh(self, rows: MemoryRows, layer: int) -> MemoryRows:
        """See ``Engine.refresh``."""
        hidden = rows.need_hidden()
        changed: dict[str, Tensor | None] = {}
        if rows.projected is not None:
            changed["projected"] = self.project(layer, hidden[None])[0].to(rows.projected)
        if rows.key is not None:
            changed["key"] = self.keys(layer, hidden)
        return rows.replace(**changed)

    def weights(self, adapters: Sequence[str] | None = None) -> WeightsState:
        """See ``Engine.weights``."""
        return self.watch.look().weights if adapters is None else self.watch.with_adapters(adapters)

    def prepared(self, memory: Memory, version: int, look: Look) -> Prepared | None:
        """What reads of ``memory`` in this version share; None where its rows are projected by every read."""
        layout = memory.stores[0].layout
        if isinstance(self.projection, str) or not layout.projected_size:
            return None
        if look.names is not None and layout.keeps_hidden:
            return None
        found = self._prepared.get(memory)
        begin: Tensor = self.mechanism.additions.begin
        weights = (look.weights, look.names, look.each, look.begin)
        if found is None or found.version != version or found.weights != weights:
            batch = None if look.names is None else len(look.names)
            found = self._prepared[memory] = Prepared(self.projection, begin, version, weights, batch)
        return found

    def padded_positions(self, mask: Tensor) -> dict[str, Tensor]:
        """``position_ids`` that skip left padding of a ``[B, T]`` mask, for decoders that take them."""
        import inspect

        if "position_ids" not in inspect.signature(type(self.model).forward).parameters:
            return {}
        return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    def encode(self, states: Sequence[StreamState], ids: Tensor) -> list[Tensor]:
        """See ``Engine.encode``. Gradients flow where they are enabled."""
        if self.watch.look_at_names() is not None:
            raise NotSupported(
                "adapter_names is for reading: a memory is written with the adapters that are active, so use "
                "set_adapter and write outside of the call"
            )
        reencode = not self.retrofit.anatomy.hybrid  # a state-space layer would read the rows standing in for old ones
        mechanism = cast("RowMechanism", self.mechanism)
        plans = [mechanism.plan_write(cast("ShortTermState", state), ids.shape[1], reencode) for state in states]
        return self.encode_plans(plans, ids)

    def encode_plans(self, plans: Sequence[WritePlan], ids: Tensor) -> list[Tensor]:
        """Run the write pass that ``plans`` describe (equal sizes in all of them) over ``ids`` ``[B, n]``.

        Raises:
            MemoryMismatchError: the decoder was unwrapped in the meantime.
            NotSupported: it has been set to an attention implementation that memory does not go with.
        """
        return self.encode_batch(DensePlan.of(plans), ids)

    @torch.compiler.disable  # as for reading
    def encode_batch(self, plan: DensePlan, ids: Tensor) -> list[Tensor]:
        """Run one write pass over ``ids`` ``[B, n]``; returns and raises as ``encode`` and ``encode_plans``."""
        self.check_wrapped()
        self.check_attention()
        additions = self.mechanism.additions
        old = plan.reencoded
        reencoded = tuple(rows[:, -old:] for rows in plan.context) if old else None
        marks = Marks(additions.mark, plan.rows, reencoded)
        offset = self._write_offset(plan) if self.retrofit.positions.offset else 0
        active = Pass(WriteSource(self, plan), self.adapter("write"), marks, text_offset=offset)
        batch, tokens = ids.shape
        inputs: dict[str, Any] = {"input_ids": ids}
        if old:
            embedded = self.embedding(ids)
            stand_in = embedded.new_zeros(batch, old, embedded.shape[-1])
            inputs = {"inputs_embeds": torch.cat([stand_in, embedded], 1)}
        if old and self.retrofit.anatomy.learned_positions:
            place = torch.cat([ids.new_zeros(old), torch.arange(tokens, device=ids.device)])
            inputs["position_ids"] = place.expand(batch, -1)
        elif offset:
            inputs["position_ids"] = torch.arange(offset, offset + old + tokens, device=ids.device).expand(batch, -1)
        mask = torch.ones(batch, old + tokens, dtype=torch.int64, device=ids.device)
        run_in(active, self.retrofit.anatomy.decoder, **inputs, attention_mask=mask, use_cache=False)
        made = [marks.made[i] for i in range(len(self.retrofit.anatomy.specs))]
        if plan.overlap:
            made = [rows + additions.mark.to(rows) for rows in made[:-1]] + made[-1:]
        return made

    def read_batch(self, source: PrefixSource, ids: Tensor, prefix_rows: int, adapter: str | None) -> Tensor:
        """Logits ``[Q, T, V]`` of texts ``[Q, T]`` that read what ``source`` gives them; gradients flow.

        Padding belongs on the right, where no text token sees it. No cache is made.

        Args:
            source: the prefix of each layer.
            ids: int64.
            prefix_rows: rows that ``source`` puts in front of a text, in the layer that has most.
            adapter: the LoRA adapter that is active.

        Raises:
            MemoryMismatchError, NotSupported: as ``encode_plans``.
        """
        self.check_wrapped()
        self.check_attention()
        inputs: dict[str, Any] = {"input_ids": ids}
        offset = 0
        if self.retrofit.positions.offset:
            offset = self.retrofit.positions.extent(prefix_rows)
            inputs["position_ids"] = torch.arange(offset, offset + ids.shape[1], device=ids.device).expand_as(ids)
        model: Any = self.model
        logits: Tensor = run_in(Pass(source, adapter, text_offset=offset), model, **inputs, use_cache=False).logits
        return logits

    def check_wrapped(self) -> None:
        """Raises MemoryMismatchError when the decoder was unwrapped."""
        if self.model.__dict__.get("mplus_engine") is not self:
            raise MemoryMismatchError(
                f"this memory's {type(self.model).__name__} is no longer wrapped: save memories before mplus.unwrap, "
                "and load them for the model once it is wrapped again"
            )
        self.bring_additions()

    def check_attention(self) -> None:
        """Raises NotSupported when the decoder would pass memory by: its attention is no longer ours."""
        decoder: Any = self.retrofit.anatomy.decoder
        now = decoder.config._attn_implementation
        if self.retrofit.technique == "attention" and not str(now).startswith(PREFIX):
            raise NotSupported(
                f"the decoder's attention implementation was set to {now!r}, which knows no memory: use "
                f"model.set_attn_implementation with one of {', '.join(BASES)}"
            )

    def _write_offset(self, plan: DensePlan) -> int:
        rows = int(plan.begin) + plan.context[0].shape[1] - plan.reencoded
        return self.retrofit.positions.extent(rows)

    def adapter(self, wanted: str) -> str | None:
        """The LoRA adapter of a pass: "write" or "read", or None without adapters."""
        adapters = self.config.adapters
        if adapters is None:
            return None
        return "write" if adapters.shared else wanted

    def keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """See ``Engine.keys``: the layer's input norm, then the retriever's key projection."""
        retriever = self.mechanism.additions.retriever
        if retriever is None or not self.mechanism.key_size:
            return None
        norm = self.retrofit.anatomy.specs[layer].norm
        where: Tensor = next(retriever.parameters(), self.mechanism.additions.begin)
        rows = hidden.to(where.device)
        keys = retriever.project_keys(layer, rows if norm is None else norm(rows))
        return None if keys is None else keys.to(hidden)

    def bind(self, retriever: Retriever) -> None:
        """Let a retriever that was built for this decoder use its attention. Raises NotSupported where it cannot."""
        retriever.attach(self.own_attention)

    def fingerprint(self, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """See ``Engine.fingerprint``."""
        model: Any = self.model
        return fingerprint(model, self.config, self.layout, model.mplus.retriever, saved)


@define(frozen=True, eq=False)
class DensePlan:
    """A ``WritePlan`` for B streams at once.

    Attributes:
        context: per layer ``[B, c, d]``, the newest rows to read, oldest first.
        begin, reencoded, rows, overlap: as in ``WritePlan``.
    """

    begin: bool
    context: tuple[Tensor, ...]
    reencoded: int
    rows: int
    overlap: bool = False

    @staticmethod
    def of(plans: Sequence[WritePlan]) -> DensePlan:
        """The plans of several streams, equal in all sizes, as one."""
        first = plans[0]
        layers = range(len(first.context))
        context = tuple(torch.stack([plan.context[layer].need_hidden() for plan in plans]) for layer in layers)
        return DensePlan(first.begin, context, first.reencoded, first.rows, first.overlap)


@define(eq=False)
class WriteSource:
    """Gives every layer ``[begin | context]`` without the rows that are queries themselves (M+ section 3.1)."""

    engine: DecoderEngine
    plan: DensePlan

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        layer, plan = spec.memory_index, self.plan
        context = plan.context[layer]
        context = context[:, : context.shape[1] - plan.reencoded].to(hidden)
        if not plan.begin:
            return (project(Prefix(context)),) if context.shape[1] else ()
        begin = self.engine.mechanism.additions.begin[layer].to(hidden).expand(context.shape[0], -1, -1)
        return (project(Prefix(torch.cat([begin, context], 1))),)
