"""A mechanism like HMT: a vector for each chunk, one list for all layers, recalled as a soft prompt that is learned."""

import math

import torch
from attrs import define, evolve
from torch import nn

from mplus.mechanisms import Absorbed, MemoryMechanism, MemoryRows, Opened, StreamState, Update, side_by_side

SENSORY = 3
"""Tokens of the last chunk that a text is read behind, and of a text that its summary is made of."""


class Recall(nn.Module):
    """The prompt of an empty memory, and the maps of the cross-attention over a memory."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, width) / 10)
        self.queries, self.keys = (nn.Linear(width, width, bias=False) for _ in range(2))


@define(frozen=True, eq=False, kw_only=True)
class SensoryState(StreamState):
    """The last ids of the last chunk, and the source they are of; all vectors lie in the store."""

    sensory: torch.Tensor
    of: torch.Tensor

    def tensors(self):
        return {"sensory": self.sensory, "of": self.of}

    def forgotten(self, number):
        return evolve(self, sensory=self.sensory[:0].clone(), of=torch.tensor(-1)) if int(self.of) == number else self

    pass_key = property(lambda self: len(self.sensory))


class SoftPromptMechanism(MemoryMechanism):
    """Reads ``[prompt | sensory | text]``, and keeps what the prompt becomes behind a chunk."""

    name, State, empty_is_base, keeps = "soft_prompt", SensoryState, False, frozenset({"hidden"})

    @classmethod
    def build(cls, shape, config, options):
        return Recall(shape.embedding_width)

    def layout(self, shape, kept, projected_size):
        return evolve(super().layout(shape, kept, projected_size), layers=1, hidden_size=shape.embedding_width)

    def capacity(self, rows):
        return rows * self.config.chunk_tokens

    def new_state(self, layout, columns=None):
        return SensoryState(sensory=torch.empty(0, dtype=torch.int64), of=torch.tensor(-1))

    def write(self, decoder, views, text):
        prompts = torch.cat([self._prompt(decoder, view, ids) for view, ids in zip(views, text.ids, strict=True)])
        read = [torch.cat([view.state.sensory.to(ids), ids]) for view, ids in zip(views, text.ids, strict=True)]
        found = decoder.run(torch.cat([prompts, decoder.embed(torch.stack(read)), prompts], 1), adapter="write")
        return Update((found.hidden[:, -1:],))

    def absorb(self, state, update, source, context):
        store, hidden = context.store, update.hidden[0].to(context.store.layout.device, context.store.layout.dtype)
        births, of = torch.tensor([state.clock]), torch.tensor([source])
        store.append(0, MemoryRows(hidden, births, of, extra=self.further(context.ids)))
        [excess] = context.evict()
        tail = context.ids[-SENSORY:].cpu().clone()
        return Absorbed(evolve(state, sensory=tail, of=torch.tensor(source), clock=state.clock + 1), 0, excess)

    def further(self, ids):
        return {}

    def open(self, decoder, views, text):
        own = []
        for stream, view in enumerate(views):
            asked = text.ids[stream] if text.mask is None else text.ids[stream][text.mask[stream]]
            sensory = decoder.embed(view.state.sensory.to(asked)[None])
            front = torch.cat([self._prompt(decoder, view, asked), sensory], 1)
            own.append(decoder.run(front, adapter="read", collect={"inputs"}).inputs)
        return Opened(views, own=own)

    def prefix(self, opened, layer, found, hidden, project):
        return (project(side_by_side([rows[layer][0].to(hidden) for rows in opened.own])),)

    def prefix_rows(self, view):
        return 1 + len(view.state.sensory)

    def _prompt(self, decoder, view, ids):
        """Return ``[1, 1, w]``: the memory, weighted by how well it goes with the summary of ids ``[n]``."""
        if not view.store.count(0):
            return self.additions.first[None]
        memory = view.store.gather(0, view.store.ids(0)).need_hidden().to(self.additions.first)
        summary = decoder.run(ids[None, :SENSORY]).hidden[:, -1:]
        scores = self.additions.queries(summary) @ self.additions.keys(memory).T / math.sqrt(memory.shape[1])
        return scores.softmax(-1) @ memory
