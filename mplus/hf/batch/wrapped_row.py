"""WrappedText: one text that goes through the wrapped decoder by itself, as ``generate`` takes it."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from attrs import define, field
from torch import Tensor
from transformers import Cache

from mplus.hf.model.installed import WrappedModel
from mplus.hf.reading.generating import generate_in
from mplus.hf.reading.reading import Reading
from mplus.hf.types import Argument


@define(eq=False)
class WrappedText:
    """A text and the cache that its tokens are in.

    Attributes:
        model: the wrapped decoder.
        reading: what its forwards read; None: the decoder alone.
        ids: ``[1, S]`` int64, what was read so far.
    """

    model: WrappedModel
    reading: Reading | None
    ids: Tensor = field(factory=lambda: torch.empty(1, 0, dtype=torch.int64))
    _inputs: dict[str, Argument] = field(factory=lambda: {"use_cache": True})

    @property
    def cache(self) -> Cache | None:
        """The key/value cache; None where the decoder keeps what it needs of a text in something else."""
        return cast("Cache | None", self._inputs.get("past_key_values"))

    @torch.no_grad()
    def read(self, new: Tensor) -> Tensor:
        """Read further tokens, ``[1, T]`` int64, and return the logits ``[V]`` of what follows."""
        model: Any = self.model  # what ``generate`` calls between its forwards is typed for transformers' own classes
        begun = self.ids.shape[1] > 0
        ids = torch.cat([self.ids.to(new.device), new], 1)
        given = {**self._inputs, "attention_mask": torch.ones_like(ids)}
        if not begun and model._supports_logits_to_keep():
            given["logits_to_keep"] = 1
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=new.shape[1] if begun else None, is_first_iteration=not begun, **given
        )
        output = generate_in(model, self.reading, model, **inputs, return_dict=True)
        self._inputs = model._update_model_kwargs_for_generation(output, given)
        self.ids = ids
        logits: Tensor = output.logits[0, -1]
        return logits

    def copied(self) -> WrappedText:
        """Return the same text with a cache of its own."""
        return WrappedText(self.model, self.reading, self.ids, copy.deepcopy(self._inputs))
