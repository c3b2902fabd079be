"""PublishedStream: do what a golden trace says, with a wrapped decoder and the mechanism of its memory."""

from __future__ import annotations

from typing import cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import CheckpointError
from mplus.eviction.base import EvictionPolicy
from mplus.hf.model.engine import DecoderEngine
from mplus.hf.model.model_class import MemoryModel
from mplus.hf.reading.generating import generating
from mplus.hf.reading.reading import Reading
from mplus.interop.trace import Permutations, Recorded
from mplus.mechanisms.mplus import MPlusMechanism
from mplus.mechanisms.opened import Retrieved
from mplus.mechanisms.short_term.mechanism import RowMechanism
from mplus.mechanisms.short_term.state import ShortTermState, state_of
from mplus.mechanisms.short_term.write import WritePass, WritePlan
from mplus.memory.memory import Memory
from mplus.memory.state import StreamView
from mplus.memory.writing.update import Update, WriteContext
from mplus.retrievers.linear import LinearRetriever
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import MemoryStore


@define(frozen=True, eq=False)
class Found:
    """Rows one layer fetched: ``ids`` ``[R]`` count through long-term memory and then the waiting area."""

    mode: str
    ids: Tensor
    ages: Tensor
    retrieved: Retrieved


@define(frozen=True, eq=False)
class Heard:
    """Outcome of a read: ``logits`` ``[1, n, V]`` per piece of text, and what each layer fetched."""

    logits: tuple[Tensor, ...]
    found: tuple[Found, ...]
    hidden_states: Tensor | None = None
    sequences: Tensor | None = None


class PublishedStream:
    """One stream of memory that goes through the steps of a trace.

    Attributes:
        model: the wrapped decoder.
        state, store: the memory; ``state`` is replaced and ``store`` changed by what writes.
    """

    def __init__(self, model: MemoryModel, memory: Memory) -> None:
        """Start from the content of ``memory`` (batch size 1), which is left as it is."""
        self.model = model
        self.engine: DecoderEngine = model.mplus_engine
        self.state = cast("ShortTermState", memory.states[0])
        self.store: MemoryStore = memory.stores[0].fork()
        self._empty = self.store.fork()
        for layer in range(self._empty.layout.layers):
            self._empty.remove(layer, self._empty.ids(layer))
        self._eviction: EvictionPolicy = memory.streams.eviction
        self._capacity = memory.capacity

    @property
    def view(self) -> StreamView:
        """The memory as a read sees it."""
        return StreamView(self.state, self.store.snapshot())

    @property
    def layers(self) -> range:
        """Layers that carry memory."""
        return range(self.engine.layout.layers)

    # ------------------------------------------------------------------ writing

    @torch.no_grad()
    def inject(self, ids: Tensor, delta: Tensor | None, update: bool, draw: Permutations) -> Tensor:
        """Write ``ids`` ``[1, n]``, reading ``delta`` ``[1, L, K, d]`` in place of the newest rows.

        Returns:
            ``[1, L, k, d]`` the new rows; they enter the memory where ``update`` is set.
        """
        mechanism = cast("RowMechanism", self.engine.mechanism)
        plan = mechanism.plan_write(self.state, ids.shape[1])
        if delta is not None and len(plan.context[0]):
            plan = evolve(plan, context=self._block(delta))
        found = WritePass(WritePlan.together([plan]), mechanism.additions).run(self.engine.decoder, ids)
        block = Update(found).of(0)
        if update:
            absorbed = mechanism.absorb(self.state, block, NO_SOURCE, self._context(draw))
            self.state = cast("ShortTermState", absorbed.state)
        return torch.stack(block.hidden)[None]

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the waiting area into long-term memory. Raises CheckpointError for a memory without one."""
        mechanism = self.engine.mechanism
        if not isinstance(mechanism, MPlusMechanism):
            raise CheckpointError("a merge step needs a memory with long-term rows; the trace is of a MemoryLLM")
        self.state, _ = mechanism.merge(self.state, self._context(Permutations(None)))

    def _context(self, draw: Permutations) -> WriteContext:
        return WriteContext(
            store=self.store, eviction=self._eviction, draw=draw, keys=self.engine.keys, capacity=self._capacity
        )

    # ------------------------------------------------------------------ reading

    def forward(self, ids: Tensor) -> Heard:
        """Read ``ids`` ``[1, n]`` with the memory in front."""
        return self._read(self.view, ids)

    def forward_with_block(self, ids: Tensor, delta: Tensor) -> Heard:
        """Read ``ids`` with nothing but begin row and ``delta`` ``[1, L, k, d]`` in front."""
        mechanism = cast("RowMechanism", self.engine.mechanism)
        begin = mechanism.has_begin(self.view)
        context = self._block(delta) if begin else tuple(rows[:0] for rows in self._block(delta))
        plan = WritePlan.together([WritePlan(begin=begin, context=context, reencoded=0, rows=0)])
        # The released code keeps the writing adapter for a block that is as long as one write makes it.
        whole = delta.shape[2] == self.engine.config.memory_tokens_per_chunk
        with torch.no_grad():
            found = self.engine.decoder.run(
                ids,
                prefix=WritePass(plan, mechanism.additions).prefix,
                prefix_rows=plan.prefix_rows,
                adapter="write" if whole else "read",
                collect=("logits", "hidden"),
            )
        states = torch.stack([*found.hidden_states[:-1], found.need_hidden()])  # published: the last one normed
        return Heard((cast("Tensor", found.logits),), (), states)

    def forward_with_pool(self, ids: Tensor, delta: Tensor, draw: Permutations) -> Heard:
        """Read ``ids`` with ``delta`` ``[1, L, k, d]`` behind as many pool rows as leave room for it."""
        view = self.view
        if cast("RowMechanism", self.engine.mechanism).has_begin(view):
            view = StreamView(evolve(self.state, stm=self._sampled(delta, draw)), view.store)
        return self._read(view, ids)

    def _sampled(self, delta: Tensor, draw: Permutations) -> tuple[MemoryRows, ...]:
        stm = []
        for rows, block in zip(self.state.stm, self._loose(delta), strict=True):
            # One permutation per layer, even where an update draws one for all layers.
            kept = draw(len(rows))[: len(rows) - len(block)].sort().values
            stm.append(MemoryRows.cat([rows.select(kept), block]))
        return tuple(stm)

    def decode(self, pieces: list[Tensor]) -> Heard:
        """Read the first piece ``[1, n]`` with the memory, and the others through the key/value cache."""
        reading = Reading(self.engine.mechanism, [self.view])
        logits, cache = [], None
        with torch.no_grad(), generating(self.model, reading):
            for piece in pieces:
                output = self.model(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
        return Heard(tuple(logits), self._found(reading))

    def generate(self, ids: Tensor, max_new_tokens: int) -> Heard:
        """Continue ``ids`` ``[1, n]`` greedily; the logits are those each new token was chosen from."""
        reading = Reading(self.engine.mechanism, [self.view], repeats_allowed=True)
        with generating(self.model, reading):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,  # never used: there is one row
                return_dict_in_generate=True,
                output_logits=True,
            )
        return Heard((torch.stack(output.logits, 1),), self._found(reading), sequences=output.sequences)

    def _read(self, view: StreamView, ids: Tensor) -> Heard:
        reading = Reading(self.engine.mechanism, [view])
        with torch.no_grad(), generating(self.model, reading):
            output = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return Heard((output.logits,), self._found(reading), torch.stack(output.hidden_states))

    def _found(self, reading: Reading) -> tuple[Found, ...]:
        view, layers = reading.views[0], []
        for layer in sorted(reading.retrieved):
            retrieved = reading.retrieved[layer][0]
            if retrieved is None:
                continue
            scored, ids = len(retrieved.scores) > 0, retrieved.ids
            if not (scored and len(state_of(view).pending[layer])):
                # Ids of the store number all rows it ever had; with pending rows they are positions already.
                ids = torch.searchsorted(view.store.ids(layer), ids)
            ages = view.state.clock - 1 - retrieved.rows.birth
            layers.append(Found("topk" if scored else "tile", ids, ages, retrieved))
        return tuple(layers)

    @torch.no_grad()
    def pool_scores(self, hidden_states: Tensor) -> Tensor:
        """Return the scores ``[L, 1, N]`` that the retriever gives the pool rows for text ``[L+1, 1, n, d]``."""
        retriever = self.engine.mechanism.retriever
        if not isinstance(retriever, LinearRetriever):
            raise CheckpointError("stm_retriever_weights need a model with a trained retriever")
        scores = []
        for layer in self.layers:
            norm = self.engine.retrofit.anatomy.specs[layer].norm
            text = hidden_states[layer]
            keys = self.engine.keys(layer, self.state.stm[layer].need_hidden())
            queries = retriever.project_queries(layer, text if norm is None else norm(text))
            if keys is not None:
                mask = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
                scores.append(retriever.score(layer, queries, mask, keys[None].to(queries.device)))
        return torch.stack(scores)

    # ------------------------------------------------------------------ state

    def adopt(self, recorded: Recorded) -> None:
        """Replace the memory by a recorded one."""
        if not recorded.initialized:
            self.state = evolve(self.state, stm=tuple(rows.select(slice(0, 0)) for rows in self.state.stm))
            return
        ages = recorded.memory_ages
        stm = tuple(self._rows(recorded.memory[layer], None if ages is None else ages[layer]) for layer in self.layers)
        if ages is None:
            self.state = evolve(self.state, stm=stm)
            return
        self.store = self._empty.fork()
        for layer in self.layers:
            rows = self._rows(recorded.ltm[layer], recorded.ltm_ages[layer], recorded.ltm_keys[layer])
            self.store.append(layer, rows.replace(expiry=recorded.ltm_recall_frequencies[layer].to(torch.float64)))
        pending = tuple(rows.select(slice(0, 0)) for rows in self.state.pending)
        if recorded.pending is not None and recorded.pending_keys is not None and recorded.pending_ages is not None:
            waiting = zip(recorded.pending, recorded.pending_ages, recorded.pending_keys, strict=True)
            pending = tuple(self._rows(*columns) for columns in waiting)
        writes = recorded.update_step // self.engine.config.memory_tokens_per_chunk
        counters = {
            "writes_since_merge": torch.tensor(writes),
            "decayed": torch.zeros(len(self.layers), dtype=torch.float64),
        }
        self.state = evolve(self.state, stm=stm, pending=pending, clock=0, counters=counters)

    def _rows(self, hidden: Tensor, ages: Tensor | None, keys: Tensor | None = None) -> MemoryRows:
        """Return rows with recorded ages, which count back from a clock of 0; without ages, in order of birth."""
        layout = self.engine.layout
        birth = torch.arange(len(hidden)) if ages is None else -1 - ages.to(torch.int64)
        source = torch.full((len(hidden),), NO_SOURCE, dtype=torch.int64)
        return MemoryRows(hidden, birth, source, keys).to(layout.device, layout.dtype)

    def _block(self, delta: Tensor) -> tuple[Tensor, ...]:
        """Return per layer ``[k, d]`` the hidden states of a block ``[1, L, k, d]``."""
        return tuple(rows.need_hidden() for rows in self._loose(delta))

    def _loose(self, delta: Tensor) -> tuple[MemoryRows, ...]:
        """Return a block ``[1, L, k, d]`` as rows that belong to no memory."""
        return tuple(self._rows(hidden, None) for hidden in delta[0])
