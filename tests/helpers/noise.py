"""What rounding does to a decoder of the table: how far numbers may be apart that it computes in two ways."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import torch

from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import BY_NAME, VOCAB_SIZE
from mplus.testing.rounding import InFloat64, allowed
from tests.helpers.architectures import REPRESENTATIVE

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, ROWS = 20, 12


@functools.cache
@torch.no_grad()
def rounding(name: str) -> float:
    """The largest error allowed in logits, and in rows of memory: several times what is measured in float32.

    Measured on the unmodified decoder in eager attention, against itself in float64: a text alone, one with memory in
    front by the oracle, and where the oracle cannot go, as layers without attention go another way, token by token.
    """
    architecture = BY_NAME[name]
    plain = architecture.build(0, "eager")
    wide = copy.deepcopy(plain).double()
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, VOCAB_SIZE, (1, TOKENS), generator=generator)
    alone = plain(input_ids=ids).logits
    with InFloat64():
        exact = wide(input_ids=ids).logits
    found = allowed(alone, exact)
    if architecture.hybrid:
        return max(found, allowed(_stepwise(plain, ids), exact))
    width, layers = plain.config.hidden_size, plain.config.num_hidden_layers
    rows = [torch.randn(ROWS, width, generator=generator) for _ in range(layers)]
    read = oracle.read(plain, ids, rows)
    with InFloat64():
        exact = oracle.read(wide, ids, [part.double() for part in rows])
    return max(found, allowed(read, exact))


@functools.cache
def worst() -> float:
    """The largest of ``rounding``, over representative decoders with attention in every layer."""
    return max(rounding(name) for name in REPRESENTATIVE if not BY_NAME[name].hybrid)


def _stepwise(model: torch.nn.Module, ids: Tensor) -> Tensor:
    output, logits = None, []
    for place in range(ids.shape[1]):
        cache = None if output is None else output.past_key_values
        output = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, 1)
