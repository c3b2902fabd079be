"""The engine behind a wrapped decoder's memories: write passes, retriever keys, fingerprint."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast
from weakref import WeakKeyDictionary

import torch
from attrs import evolve
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mplus.config import Component, JsonValue, MPlusConfig
from mplus.errors import ConfigError, MemoryMismatchError, NotSupported
from mplus.hf.adapters.fingerprint import fingerprint
from mplus.hf.adapters.weights import Look, Watch
from mplus.hf.model.decoder import WrappedDecoder
from mplus.hf.model.offloading import bring_back, input_device
from mplus.hf.reading.open_readings import OpenReadings
from mplus.hf.retrofit.attention import BASES, PREFIX
from mplus.hf.retrofit.attention_probe import OwnAttention
from mplus.hf.retrofit.hooks import Retrofit
from mplus.hf.retrofit.projection import Projection
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import DecoderShape, Text
from mplus.memory.memory import Memory
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamState, StreamView
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.passages import Passage
from mplus.memory.writing.update import NewEntries, Update
from mplus.retrievers.base import Retriever
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.tokenizer import Tokenizer


class DecoderEngine:
    """One wrapped decoder, seen from its memories (see ``mplus.memory.engine.Engine``).

    Attributes:
        model: the wrapped decoder.
        config: its memory configuration.
        retrofit: how memory gets into its attention.
        decoder: the same decoder, seen from the mechanism.
        mechanism: the rules of its memories.
        shape: of the decoder, as it was when it was wrapped.
        projection: how rows are kept projected, or why they cannot be.
        tokenizer: of memories that are given none.
        readings: the blocks of ``model.reading`` that are open.
    """

    writes_text: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel,
        config: MPlusConfig,
        retrofit: Retrofit,
        mechanism: MemoryMechanism,
        shape: DecoderShape,
    ) -> None:
        self.model = model
        self.config = config
        self.retrofit = retrofit
        self.mechanism = mechanism
        self.shape = shape
        self._embedded_as = self._embedding_dtype
        self.projection: Projection | str = "the decoder was wrapped without a self-check"
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.decoder = WrappedDecoder(self)
        self.own_attention = OwnAttention(self)
        self.watch = Watch(self)
        self._prepared: WeakKeyDictionary[Memory, tuple[Hashable, Any]] = WeakKeyDictionary()
        self._shared: WeakKeyDictionary[Memory, tuple[Hashable, dict[str, Any]]] = WeakKeyDictionary()
        self.readings = OpenReadings()

    def __getstate__(self) -> dict[str, Any]:
        # Weak tables and open blocks are of this process; a copy begins with new ones.
        own = ("watch", "_prepared", "_shared", "readings")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, watch=Watch(self), _prepared=WeakKeyDictionary(), _shared=WeakKeyDictionary())
        self.readings = OpenReadings()

    @property
    def embedding(self) -> nn.Module:
        """Return the decoder's token embedding."""
        return self.model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Return the device where input ids go, and by default the rows of memories."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of memory rows: that of hidden states, unless the mechanism says another one."""
        return self.mechanism.dtype or self.hidden_dtype

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Return the dtype of hidden states: as it was seen by ``wrap``, or what the decoder was converted to since."""
        now = self._embedding_dtype
        return self.shape.dtype if now == self._embedded_as else now

    @property
    def _embedding_dtype(self) -> torch.dtype:
        return cast("Tensor", self.embedding.weight).dtype

    @property
    def vocab_size(self) -> int:
        return cast("Tensor", self.embedding.weight).shape[0]

    @property
    def memory_rows(self) -> Literal["projected", "hidden", "both"]:
        """Return the form in which new memories keep rows, by the config; see ``MPlusConfig.memory_rows``."""
        wanted, keeps = self.config.memory_rows, self.mechanism.keeps
        if wanted != "auto":
            if wanted not in keeps:
                raise ConfigError(
                    f"memory_rows must be one of {', '.join(map(repr, sorted(keeps)))} or 'auto' with the mechanism "
                    f"{self.mechanism.name!r}, got {wanted!r}"
                )
            return wanted
        if len(keeps) == 1:
            (only,) = keeps
            return only
        smaller = isinstance(self.projection, Projection) and self.projection.size < self.shape.width
        if not smaller or self.config.variant == "published":
            return "hidden"
        # Keys and values are bound to the adapters they were made with, hidden states are not.
        return "hidden" if self.watch.has_adapters_of_user() else "projected"

    @property
    def layout(self) -> StoreLayout:
        return self.layout_of(self.memory_rows)

    def layout_of(self, memory_rows: Literal["projected", "hidden", "both"]) -> StoreLayout:
        """Return the layout of memories that keep this of a row. Raises NotSupported where rows cannot be projected."""
        size = 0
        if memory_rows != "hidden":
            if isinstance(self.projection, str):
                other = "use 'hidden' or 'auto'"
                if "hidden" not in self.mechanism.keeps:
                    other = f"the mechanism {self.mechanism.name!r} needs them, so use another one"
                raise NotSupported(
                    f"memory_rows={memory_rows!r} cannot be had with {type(self.model).__name__}: {self.projection}; "
                    f"{other}"
                )
            size = self.projection.size
        return self.mechanism.layout(self.decoder.shape, memory_rows, size)

    def bring_additions(self) -> None:
        """Bring back what mplus added from where it is offloaded. Raises NotSupported when it has no values.

        It is looked at outside of any ``forward``, so accelerate, which may have offloaded it, would not bring it.
        """
        additions = getattr(self.model, "mplus", None)
        if additions is not None:
            bring_back(additions, f"what mplus.wrap added to {type(self.model).__name__} (model.mplus)")

    def new_state(self, layout: StoreLayout) -> StreamState:
        """Return a new stream, bound to the present weights; see ``Engine.new_state``."""
        self.bring_additions()
        return evolve(self.mechanism.new_state(layout, self), weights=self.weights())

    @torch.no_grad()
    def project(self, part: int, hidden: Tensor) -> Tensor:
        """Return keys and values ``[B, n, w]`` of rows ``[B, n, d]``, without a graph; see ``Engine.project``."""
        return self.project_in(self.mechanism.layer_of(part), hidden)

    def project_in(self, layer: int, hidden: Tensor) -> Tensor:
        """Return un-rotated keys and values ``[B, n, w]`` of rows ``[B, n, d]`` in a layer that carries memory.

        Gradients flow where they are enabled.
        """
        return self.need_projection().rows(layer, hidden.to(self.device)).to(hidden.device)

    def need_projection(self) -> Projection:
        """Return the projection of rows to keys and values. Raises NotSupported where they cannot be."""
        if isinstance(self.projection, str):
            raise NotSupported(f"rows cannot be kept projected in {type(self.model).__name__}: {self.projection}")
        return self.projection

    def refresh(self, rows: MemoryRows, part: int) -> MemoryRows:
        """Compute the columns of rows that depend on weights anew; see ``Engine.refresh``."""
        hidden = rows.need_hidden()
        changed: dict[str, Tensor | None] = {}
        if rows.projected is not None:
            changed["projected"] = self.project(part, hidden[None])[0].to(rows.projected)
        if rows.key is not None:
            changed["key"] = self.keys(part, hidden)
        return rows.replace(**changed)

    def weights(self, adapters: Sequence[str] | None = None) -> WeightsState:
        """Return the state of the weights that rows depend on; see ``Engine.weights``."""
        return self.watch.look().weights if adapters is None else self.watch.with_adapters(adapters)

    def prepared(self, memory: Memory, version: int, look: Look, *, together: bool = False) -> Any:
        """Return the prepared rows that all reads of this version share; None where every read projects its rows.

        Rows that are kept as hidden states are projected once for reads ``together`` with other memories.
        """
        layout = memory.stores[0].layout
        if isinstance(self.projection, str) or not (layout.projected_size or together):
            return None
        if layout.keeps_hidden and (look.names is not None or self.retrofit.technique != "attention"):
            return None
        found = self._prepared.get(memory)
        made_for = (version, look.weights, look.names, look.each, look.preparing)
        if found is None or found[0] != made_for:
            batch = None if look.names is None else len(look.names)
            found = self._prepared[memory] = (made_for, self.mechanism.prepare(self.projection, batch))
        return found[1]

    def shared(self, memory: Memory, version: int, look: Look) -> dict[str, Any] | None:
        """Return the table of what reads of ``memory`` in this version share; see ``Text.shared``.

        None where gradients flow, in training mode, and where each batch row has an adapter of its own.
        """
        if torch.is_grad_enabled() or self.model.training or look.names is not None:
            return None
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        attention = cast("PreTrainedModel", self.retrofit.anatomy.decoder).config._attn_implementation
        made_for = (version, self.watch.mark_of_all(look), autocast, attention)
        found = self._shared.get(memory)
        if found is None or found[0] != made_for:
            found = self._shared[memory] = (made_for, {})
        return found[1]

    def padded_positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return ``position_ids`` that skip left padding of a ``[B, T]`` mask, for decoders that take them."""
        import inspect

        if "position_ids" not in inspect.signature(type(self.model).forward).parameters:
            return {}
        return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    def write(
        self,
        views: Sequence[StreamView],
        ids: Tensor,
        tokenizer: Tokenizer | None = None,
        sources: Sequence[int | None] = (),
        short: bool = False,
    ) -> Update:
        """Let the mechanism make the rows of one chunk, ids ``[B, n]`` int64; see ``Engine.write``.

        Gradients flow where they are enabled.
        """
        if self.watch.look_at_names() is not None:
            raise NotSupported(
                "adapter_names is for reading: a memory is written with the adapters that are active, so use "
                "set_adapter and write outside of the call"
            )
        self.check_wrapped()
        text = Text(ids, tokenizer=tokenizer, sources=tuple(sources), short=short)
        return self.mechanism.write(self.decoder, views, text)

    @torch.no_grad()
    def search(self, view: StreamView, text: str, k: int, tokenizer: Tokenizer | None) -> list[FoundText]:
        """Let the mechanism say what ``text`` would bring back; see ``Engine.search``."""
        self.check_wrapped()
        return self.mechanism.search(self.decoder, view, text, k, tokenizer)

    def write_text(self, views: Sequence[StreamView], passages: Sequence[Passage]) -> NewEntries:
        """Raise NotSupported: these memories are made of rows."""
        raise NotSupported(f"memories of the mechanism {self.mechanism.name!r} are made of rows, not of text")

    def check_options(self, **given: Component | torch.device | JsonValue) -> None:
        """Accept all options: each means something to memories of rows; see ``Engine.check_options``."""

    def check_wrapped(self) -> None:
        """Raise MemoryMismatchError when the decoder was unwrapped."""
        if self.model.__dict__.get("mplus_engine") is not self:
            raise MemoryMismatchError(
                f"this memory's {type(self.model).__name__} is no longer wrapped: save memories before mplus.unwrap, "
                "and load them for the model once it is wrapped again"
            )
        self.bring_additions()

    def check_attention(self) -> None:
        """Raise NotSupported when the decoder would pass memory by: its attention is no longer ours."""
        now = cast("PreTrainedModel", self.retrofit.anatomy.decoder).config._attn_implementation
        if self.retrofit.technique == "attention" and not str(now).startswith(PREFIX):
            raise NotSupported(
                f"the decoder's attention implementation was set to {now!r}, which knows no memory: use "
                f"model.set_attn_implementation with one of {', '.join(BASES)}"
            )

    def adapter(self, wanted: str) -> str | None:
        """Return the LoRA adapter of a pass: "write" or "read", or None without adapters."""
        adapters = self.config.adapters
        if adapters is None:
            return None
        return "write" if adapters.shared else wanted

    def keys(self, part: int, hidden: Tensor) -> Tensor | None:
        """Return retriever keys ``[m, r]`` of rows ``[m, d]``; see ``Engine.keys``."""
        return self.keys_in(self.mechanism.layer_of(part), hidden)

    def keys_in(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return retriever keys of rows ``[m, d]``: the layer's input norm, then the retriever's key projection."""
        retriever = self.mechanism.retriever
        if retriever is None or not self.mechanism.key_size:
            return None
        norm = self.retrofit.anatomy.specs[layer].norm
        weight = next(retriever.parameters(), None)
        rows = hidden.to(self.device if weight is None else weight.device)
        keys = retriever.project_keys(layer, rows if norm is None else norm(rows))
        return None if keys is None else keys.to(hidden)

    def attach(self, retriever: Retriever) -> None:
        """Let a retriever that was built for this decoder use its attention. Raises NotSupported where it cannot."""
        retriever.attach(self.own_attention)

    def fingerprint(self, saved: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue]:
        """Return the facts about the decoder that a memory depends on; see ``Engine.fingerprint``."""
        return fingerprint(self.model, self.config, self.layout, self.mechanism.retriever, saved)
