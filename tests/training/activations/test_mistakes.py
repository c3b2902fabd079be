"""Mistakes that code of this kind is known to have are seen: gradients, bytes or a generator are off, or it raises."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mplus.errors import MPlusError
from mplus.training.activations import layer_call, layer_run, managed
from mplus.training.activations.counter import CountedBytes
from mplus.training.activations.layer_call import LayerCall
from mplus.training.activations.layer_run import KeptLayer
from mplus.training.activations.layout import SavedLayout
from mplus.training.activations.planning import held_bytes
from mplus.training.activations.randomness import LastTokensDraws, RandomState
from mplus.training.activations.saved import Outliving
from mplus.training.activations.swapped_layer import AttentionStandIn, SwappedLayer
from tests.training.activations.test_managed import sizes
from tests.training.activations.tiny_llama import TOKENS, build, equal, gradients


@functools.cache
def decoders() -> tuple[Any, ...]:
    """Return a Llama, a GPT-2 with dropout in attention too, and one whose attention gets parts of one tensor."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "embd_pdrop": 0.0}
    found = [GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=dropout)).train() for dropout in (0.1, 0.0)]
    return build(), *found


@functools.cache
def kept(place: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the gradients of a decoder with everything kept, and what is drawn next."""
    return gradients(decoders()[place], "keep")[0], torch.rand(1)


def faults() -> Iterator[str]:
    """Yield what is wrong in how activations are held."""
    for place, model in enumerate(decoders()):
        expected, drawn = kept(place)
        for way, share in (("keep", None), ("recompute", None), ("swap", None), ("memo", 0), ("memo", 0.5)):
            label = f"{type(model).__name__} {place}, {way}, {share}"
            try:
                got, held, counter = gradients(model, way, share)
            except (MPlusError, RuntimeError, IndexError) as error:
                yield f"{label}: {error}"
                continue
            if not (equal if share != 0.5 else close)(got, expected):
                yield f"{label}: gradients"
            if not torch.equal(torch.rand(1), drawn):
                yield f"{label}: the generator"
            formula = held_bytes(sizes(), mode=way, layers=4, tokens=TOKENS, share=share or 0)
            if place == 0 and held != formula:
                yield f"{label}: bytes {held}, not {formula}"
            if (counter.device, counter.host) != (0, 0):
                yield f"{label}: bytes are left"


def close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)


def no_offset(self, tensor):
    return tensor.untyped_storage().data_ptr(), 0, tensor.numel(), self.blocks or self.sizes


def by_size(self, tensor):
    return 0, 0, tensor.numel(), self.blocks or self.sizes


def without_order(self, numbers):
    return numbers.reshape(self.shape)


def first_tokens(value, batch, tokens, first):
    sliced = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens
    if sliced:
        return value[:, : tokens - first]
    return tuple(first_tokens(part, batch, tokens, first) for part in value) if isinstance(value, tuple) else value


def drawn_of_part(self, part, draw):
    return draw(torch.zeros_like(part))


def without_regions(self, function):
    return function()


def attended_again(self, attend, query, key, value):
    return attend()


def every_tensor(self, hidden, saved_tensors):
    for one in saved_tensors:
        one.counted = CountedBytes(self.counter, "device", one.need_tensor().nbytes)


@contextmanager
def replayed_without_end(self):
    self.set()
    yield


def last_before_first(self, group, plain=SwappedLayer._numbers):
    numbers = plain(self, group)
    cut = group.source is not None and 0 < self._first < self.call.tokens
    return torch.cat([numbers[:, :, self._first :], numbers[:, :, : self._first]], 2) if cut else numbers


def input_learns_never(self, *args, plain=LayerCall.again, **kwargs):
    self = copy.copy(self)
    self.learns = not self.learns
    return plain(self, *args, **kwargs)


class Recent(list):
    """Originals that are held until the next one is saved only."""

    def append(self, one):
        super().append(one)
        for earlier in self[:-1]:
            earlier.tensor = torch.zeros_like(earlier.tensor)


def forgetful(self, call, hidden, counter, *args, plain=layer_run.LayerRun.__init__):
    plain(self, call, hidden, counter)
    self._saved = Recent()


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "views of one storage are taken for one": (SavedLayout, "key", no_offset),
    "tensors of one size are taken for one": (SavedLayout, "key", by_size),
    "the order in memory is forgotten": (SavedLayout, "restore", without_order),
    "originals are not held until they are copied": (layer_run.LayerRun, "__init__", forgetful),
    "positions are those of the first tokens": (layer_call, "last_tokens", first_tokens),
    "generators are not set back": (RandomState, "set", lambda self: None),
    "generators are left where a recomputation ends": (RandomState, "replayed", replayed_without_end),
    "dropout is drawn for the last tokens alone": (LastTokensDraws, "_drawn", drawn_of_part),
    "what attention drew is not skipped": (AttentionStandIn, "_skip_draws", lambda self: None),
    "attention is computed again": (AttentionStandIn, "attend", attended_again),
    "tensors of attention are numbered": (SwappedLayer, "_apart", without_regions),
    "recomputed tokens come before the others": (SwappedLayer, "_numbers", last_before_first),
    "the input needs no gradient when it is run again": (LayerCall, "again", input_learns_never),
    "parameters are swapped": (Outliving, "__contains__", lambda self, tensor: False),
    "one layer alone is kept": (managed, "KEPT_LAYERS", 1),
    "tokens are rounded up": (managed, "swapped_tokens", lambda share, tokens: min(tokens, int(share * tokens) + 1)),
    "views count, not storages": (KeptLayer, "settle", every_tensor),
    "bytes never stop to count": (CountedBytes, "__del__", lambda self: None),
}


def test_nothing_is_wrong_without_a_mistake():
    assert list(faults()) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(monkeypatch, mistake):
    for place in range(len(decoders())):
        kept(place)
    where, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(where, name, wrong)
    assert next(faults(), None)
