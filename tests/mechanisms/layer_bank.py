"""A mechanism like MemLong: keys and values of one layer, read by all layers from there on through a learned gate."""

import torch
from attrs import define, evolve
from torch import nn

from mplus.backends.base import AttentionResult, Segment
from mplus.mechanisms import Absorbed, Attended, MemoryMechanism, MemoryRows, Opened, Update
from mplus.mechanisms.kv.state import KvState
from mplus.mechanisms.search import choose
from mplus.retrievers.chunks.bm25 import bm25


class Gate(nn.Module):
    """How much of its memory each head takes in; half of it at the start."""

    def __init__(self, heads):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, request, compute):
        without = compute(evolve(request, segments=(), joined=None)).output
        return AttentionResult(without + self.gate.sigmoid() * (compute(request).output - without))


class LayerBankMechanism(MemoryMechanism):
    """Keeps what one layer made of every token; the table of chunks is that of ``kv``."""

    @define(frozen=True, kw_only=True)
    class Options(MemoryMechanism.Options):
        layer: int = 2

    name, State, attends, retrieves_in_open, keeps = "layer_bank", KvState, True, True, frozenset({"projected"})

    @classmethod
    def build(cls, shape, config, options):
        return Gate(shape.heads)

    def layout(self, shape, kept, projected_size):
        return evolve(super().layout(shape, kept, projected_size), layers=1)

    def new_state(self, layout, columns=None):
        return KvState.empty(layout)

    def write(self, decoder, views, text):
        found = decoder.run(text.ids, adapter="write", collect={"projected"})
        return Update((), (found.projected[self.options.layer],))

    def absorb(self, state, update, source, context):
        store, ids, layout = context.store, context.ids, context.store.layout
        births = torch.arange(state.clock, state.clock + len(ids), device=layout.device)
        rows = update.projected[0].to(layout.device, layout.dtype)
        store.append(0, MemoryRows(None, births, torch.full_like(births, source), projected=rows))
        state = state.with_chunk(ids, source)
        before = state.tokens
        while context.capacity is not None and state.tokens > context.capacity:  # whole chunks, the oldest first
            store.remove(0, store.ids(0)[: int(state.chunk_length[0])])
            state = state.with_chunks(torch.arange(len(state.chunk_length)) > 0)
        return Absorbed(state, 0, before - state.tokens)

    def open(self, decoder, views, text):
        rows = []
        for stream, view in enumerate(views):
            asked = text.ids[stream] if text.mask is None else text.ids[stream][text.mask[stream]]
            lengths, places = view.state.chunk_length, torch.empty(0, dtype=torch.int64)
            if len(lengths):
                scores = bm25(lengths, view.state.token_ids, asked, k1=1.5, b=0.75)
                places = view.state.places(choose(lengths, scores, self.config.retrieved_tokens).sort().values)
            found = view.store.gather(0, view.store.ids(0)[places.to(view.store.layout.device)])
            rows.append(found.columns()["projected"])
        counts, kept = torch.tensor([len(one) for one in rows]), decoder.kept
        return Opened(views, own=(kept, rows, counts), text_offset=counts if kept.positions.offset else None)

    def prefix(self, opened, layer, found, hidden, project):
        kept, rows, counts = opened.own
        most, counts = int(counts.max()), counts.to(hidden.device)
        if layer < self.options.layer or not most:
            return None
        padded = torch.stack([nn.functional.pad(one.to(hidden), (0, 0, 0, most - len(one))) for one in rows])
        place, first = torch.arange(most, device=hidden.device), counts[:, None] * kept.positions.offset
        positions = kept.positions.of_rows(place, counts[:, None], first)
        segment = kept.turned(layer, [padded], kept.tables(layer, hidden, positions))
        return Attended((Segment(segment.keys, segment.values, counts),), self.additions)

    def prefix_rows(self, view):
        return min(view.state.tokens, self.config.retrieved_tokens)
