"""A plain decoder that reads text and kept keys and values in any order: what a memory in a prompt is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

if TYPE_CHECKING:
    from torch import Tensor

    from mplus.memory import Memory


class PlainReader:
    """Reads with transformers alone, at consecutive positions.

    Args:
        model: a Llama.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.place = model, DynamicCache(), 0

    @torch.no_grad()
    def text(self, ids: Tensor) -> Tensor:
        """Read ``[n]`` ids and return the logits ``[n, V]``."""
        positions = torch.arange(self.place, self.place + len(ids))[None]
        self.place += len(ids)
        found: Tensor = self.model(
            ids[None], past_key_values=self.cache, position_ids=positions, use_cache=True
        ).logits[0]
        return found

    @torch.no_grad()
    def chunk(self, memory: Memory, number: int, stream: int = 0) -> None:
        """Let what comes see the rows of a chunk, at the positions that text of its length would have."""
        state, store = memory.states[stream], memory.stores[stream]
        places = state.places(torch.tensor([number]))
        positions = torch.arange(self.place, self.place + len(places))[None]
        self.place += len(places)
        config = self.model.config
        for layer in range(config.num_hidden_layers):
            rows = store.gather(layer, store.ids(layer)[places]).columns()["projected"]
            keys, values = (
                part.unflatten(-1, (config.num_key_value_heads, -1)).transpose(0, 1)[None] for part in rows.chunk(2, -1)
            )
            cos, sin = self.model.model.rotary_emb(rows, positions)
            self.cache.update(keys * cos + rotate_half(keys) * sin, values, layer)

    def answer(self, ids: Tensor, tokens: int) -> list[int]:
        """Read ``[n]`` ids and return the most likely ``tokens`` that follow; the last of them is not read."""
        found = [int(self.text(ids)[-1].argmax())]
        while len(found) < tokens:
            found.append(int(self.text(torch.tensor(found[-1:]))[-1].argmax()))
        return found
