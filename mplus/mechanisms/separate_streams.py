"""SeparateStreams: training streams of any mechanism, by its own ``write``, ``absorb``, ``retrieve`` and ``prefix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor

from mplus.backends.base import Segment
from mplus.errors import ConfigError, InputError, NotSupported
from mplus.eviction import EVICTION
from mplus.mechanisms.decoder import Adapter, Attended, Decoder, KeptProjection, PassResult, Project, Text
from mplus.mechanisms.graph_store import GraphStore, detached
from mplus.mechanisms.streams import Candidates, LayerRead, Read, TrainingStreams
from mplus.memory.state import StreamState, StreamView, alike
from mplus.memory.writing.update import Update, WriteContext
from mplus.rows import MemoryRows
from mplus.stores.access_log import AccessLog
from mplus.stores.base import StoreLayout

if TYPE_CHECKING:
    from mplus.mechanisms.base import MemoryMechanism
    from mplus.mechanisms.opened import Retrieved

COMMON = ("clock", "sources", "texts", "tail", "weights")


class SeparateStreams(TrainingStreams):
    """One state and one store per stream, and a pass for those that can share it.

    Every rule is the mechanism's own, options and eviction included, so that what is trained is what a user's memory
    does; a mechanism whose many streams can be held as one tensor is faster with an answer of its own to ``streams``.

    Args:
        mechanism: of all streams.
        decoder: runs its passes.
        layout: of the rows.
        numbers: global number of each stream.
        seed: of all draws.
        capacity: rows that a layer of a store may hold; None: no limit.
        projection: of rows that are kept as keys and values; None: there are none.
    """

    def __init__(
        self,
        mechanism: MemoryMechanism,
        decoder: Decoder,
        layout: StoreLayout,
        numbers: Sequence[int],
        *,
        seed: int,
        capacity: int | None,
        projection: KeptProjection | None = None,
    ) -> None:
        super().__init__(numbers, seed)
        self.mechanism, self.decoder, self.layout = mechanism, decoder, layout
        self.capacity, self.projection = capacity, projection
        self._eviction = EVICTION.build(mechanism.config.eviction)
        self.reset()

    @property
    def clock(self) -> int:  # type: ignore[override]
        return self.states[0].clock

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states) + sum(store.nbytes for store in self.stores)

    def reset(self) -> None:
        streams = range(len(self))
        self.states: list[StreamState] = [self.mechanism.new_state(self.layout, self.decoder) for _ in streams]
        self.stores = [GraphStore(self._store_layout()) for _ in streams]
        self._access_logs = [AccessLog() if self._eviction.needs_access_log else None for _ in streams]

    def _store_layout(self) -> StoreLayout:
        expires = self.mechanism.lifetime(self._eviction) is not None
        return evolve(self.layout, expiry=self.layout.expiry or expires)

    def detach(self) -> None:
        self.states = [_rebuilt(state, self.layout) for state in self.states]
        for store in self.stores:
            store.detach()

    def write(self, ids: Tensor, source: Tensor) -> None:
        self.absorb(self._update(ids, source.tolist()), source)

    def encode(self, ids: Tensor) -> Update:
        return self._update(ids, None)

    def _update(self, ids: Tensor, sources: Sequence[int] | None) -> Update:
        """Encode chunks of ``sources``; None: nobody knows yet."""
        most = self.mechanism.config.chunk_tokens
        if ids.ndim != 2 or ids.shape[0] != len(self) or not 1 <= ids.shape[1] <= most:
            raise InputError(f"chunks must be [{len(self)}, 1 to chunk_tokens ({most})], got {list(ids.shape)}")
        ids, views = ids.to(self.layout.device), self._views()
        groups = alike(list(ids), [view.state for view in views])
        updates = [
            self._encode([views[row] for row in group], ids[group], [sources[row] for row in group] if sources else ())
            for group in groups
        ]
        order = torch.tensor([row for group in groups for row in group]).argsort()
        if len({rows.shape[1] for update in updates for rows in (*update.hidden, *update.projected)}) > 1:
            raise NotSupported(
                f"training needs equally many new rows for every stream, and the mechanism {self.mechanism.name!r} "
                "makes different numbers of them"
            )
        hidden, projected = (
            tuple(torch.cat(parts)[order.to(parts[0].device)] for parts in zip(*of, strict=True))
            for of in ([update.hidden for update in updates], [update.projected for update in updates])
        )
        beside = [one for update in updates for one in update.beside]
        return Update(hidden, projected, ids, tuple(beside[place] for place in order.tolist()) if beside else ())

    def _encode(self, views: Sequence[StreamView], ids: Tensor, sources: Sequence[int]) -> Update:
        update = self.mechanism.write(self.decoder, views, Text(ids, sources=tuple(sources)))
        Update.check(update, self.mechanism.name, len(views), [self.layout] * len(views))
        if self.layout.projected_size and not update.projected:
            layers = map(self.mechanism.layer_of, range(len(update.hidden)))
            projected = tuple(map(self.decoder.project, layers, update.hidden))
            update = evolve(update, projected=projected)
        return update

    def absorb(self, update: Update, source: Tensor) -> None:
        for row, number in enumerate(source.tolist()):
            one = update.of(row)
            context = self._context(self.stores[row], self.generators[row], self._access_logs[row], one.ids)
            self.states[row] = self.mechanism.absorb(self.states[row], one, number, context).state

    def _context(
        self, store: GraphStore, generator: torch.Generator, access_log: AccessLog | None, ids: Tensor | None
    ) -> WriteContext:
        return WriteContext(
            store=store,
            eviction=self._eviction,
            draw=lambda n: torch.randperm(n, generator=generator),
            keys=lambda part, hidden: self.decoder.keys(self.mechanism.layer_of(part), hidden),
            ids=ids,
            capacity=self.capacity,
            access_log=access_log,
        )

    def read(
        self,
        texts: Tensor,
        *,
        queries: Tensor | None = None,
        candidates: Candidates | None = None,
        logits_to_keep: int = 0,
    ) -> Read:
        if candidates is not None:
            raise NotSupported(
                f"streams of the mechanism {self.mechanism.name!r} offer no candidates to a retriever loss: leave "
                "retriever_loss out"
            )
        return self._read(self._views(), texts, queries, "read", logits_to_keep)

    def read_update(self, update: Update, texts: Tensor, adapter: Adapter) -> Read:
        views = []
        for row in range(len(self)):
            state, store = self.mechanism.new_state(self.layout, self.decoder), GraphStore(self._store_layout())
            # A generator of its own: what is read by itself must not move the draws of the stream.
            one = update.of(row)
            context = self._context(store, torch.Generator().manual_seed(row), None, one.ids)
            absorbed = self.mechanism.absorb(state, one, 0, context)
            views.append(StreamView(absorbed.state, store.snapshot()))
        return self._read(views, texts, None, adapter)

    def _views(self) -> list[StreamView]:
        parts = zip(self.states, self.stores, self._access_logs, strict=True)
        return [StreamView(state, store.snapshot(), log) for state, store, log in parts]

    def _read(
        self,
        streams: Sequence[StreamView],
        texts: Tensor,
        queries: Tensor | None,
        adapter: Adapter,
        logits_to_keep: int = 0,
    ) -> Read:
        batch, each, tokens = texts.shape
        views = [view for view in streams for _ in range(each)]  # the texts of a stream share its view
        ids = texts.flatten(0, 1)
        mask = torch.ones_like(ids, dtype=torch.bool) if queries is None else queries.flatten(0, 1)
        source = _TextPrefix(self, views, Text(ids, mask, query=mask, limited=queries is not None))
        empty = self.mechanism.empty_is_base and not any(map(self.mechanism.has_prefix, views))
        finish = source.finish if self.mechanism.finishes and not empty else None
        offset = source.opened.text_offset
        found = self.decoder.run(
            ids,
            prefix=source.prefix,
            prefix_rows=max(map(self.mechanism.prefix_rows, views)),
            adapter=None if empty else adapter,
            positions=None if offset is None else offset.to(ids.device)[:, None] + torch.arange(tokens).to(ids.device),
            collect={"logits", *self.mechanism.collect} if finish else {"logits"},
            logits_to_keep=logits_to_keep,
            finish=finish,
            insertion=source.opened.insertion,
        )
        logits = found.logits
        assert logits is not None  # noqa: S101  (they were asked for)
        layers = {layer: LayerRead(text.view(batch, each, tokens, -1)) for layer, text in source.texts.items()}
        return Read(logits.view(batch, each, *logits.shape[1:]), layers)

    def state_dict(self) -> dict[str, Any]:
        return {
            "states": [_plain(state) for state in self.states],
            "stores": [store.state_dict() for store in self.stores],
            **self.generator_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "states" not in state or len(state["states"]) != len(self):
            raise ConfigError(
                f"the saved streams must be {len(self)} of the mechanism {self.mechanism.name!r}, got "
                f"{len(state['generators'])}" + ("" if "states" in state else " of another one")
            )
        device = self.layout.device
        for row, saved in enumerate(state["states"]):
            rows = {name: [MemoryRows.of(part).to(device) for part in parts] for name, parts in saved["lists"].items()}
            new = type(self.states[row]).from_parts(self.layout, rows, saved["tensors"], clock=saved["clock"])
            self.states[row] = new
            self.stores[row].load_state_dict(state["stores"][row])
        self.load_generator_states(state)


class _TextPrefix:
    """Gives every layer what it sees in front of texts.

    A recomputation in backward (gradient checkpointing) finds what the first pass retrieved.
    """

    def __init__(self, streams: SeparateStreams, views: Sequence[StreamView], text: Text) -> None:
        self.mechanism, self.views = streams.mechanism, views
        self.mask = torch.ones_like(text.need_ids(), dtype=torch.bool) if text.mask is None else text.mask
        opened = self.mechanism.open(streams.decoder, views, text)
        kept = streams.projection
        if kept is not None and not streams.layout.keeps_hidden:
            opened = evolve(opened, prepared=self.mechanism.prepare(kept, None))
        self.opened, self.text = opened, text
        self.texts: dict[int, Tensor] = {}
        self._found: dict[int, list[Retrieved | None]] = {}

    def prefix(self, layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...] | Attended | None:
        """Return what a layer sees in front of its text: a ``mplus.mechanisms.decoder.Prefix``."""
        self.texts.setdefault(layer, hidden)
        if not any(map(self.mechanism.has_prefix, self.views)):
            return ()
        if layer not in self._found:
            with torch.no_grad():
                self._found[layer] = self.mechanism.retrieve(layer, hidden.detach(), self.mask, self.views)
        return self.mechanism.prefix(self.opened, layer, self._found[layer], hidden, project)

    def finish(self, result: PassResult) -> Tensor:
        """Return the final hidden state, as the mechanism gives it: a ``mplus.mechanisms.decoder.Finish``."""
        whole = Text(self.text.ids)  # the mask says which tokens retrieve: there is no padding
        return self.mechanism.finish(self.opened, evolve(result, text=whole), self.mechanism.new_cache())


def _rebuilt(state: StreamState, layout: StoreLayout) -> StreamState:
    """Return a state whose rows and tensors have no graph, without what the step to come will compute otherwise."""
    state = state.without_computed()
    rows = {name: [detached(part) for part in parts] for name, parts in state.row_lists().items()}
    tensors = {name: tensor.detach() for name, tensor in state.tensors().items()}
    return type(state).from_parts(layout, rows, tensors, **{name: getattr(state, name) for name in COMMON})


def _plain(state: StreamState) -> dict[str, Any]:
    lists = {name: [detached(part).columns() for part in parts] for name, parts in state.row_lists().items()}
    return {"lists": lists, "tensors": {n: t.detach() for n, t in state.tensors().items()}, "clock": state.clock}
