"""Every objective has the same gradients, bit for bit, however activations are held; dropout included."""

from __future__ import annotations

import copy

import pytest
import torch

from mplus.training import manage_activations
from mplus.training.objectives.losses import RetrieverLoss
from tests.training.activations.tiny_llama import WAYS, equal
from tests.training.test_objectives import TABLE, collate, prepared, run

pytestmark = pytest.mark.two_computations


@pytest.fixture(scope="module")
def decoder():
    """A decoder of three layers, of which the first one is swapped, its streams, and their state."""
    model, streams = prepared(adapters={"rank": 2, "dropout": 0.3})
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model.train(), streams, copy.deepcopy(streams.state_dict())


def gradients(decoder, name, way, share):
    model, streams, state = decoder
    streams.load_state_dict(copy.deepcopy(state))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with manage_activations(model, way, swapped_share=share) as counter:
        batch = collate(first=103 if name == "revisit" else 0)
        _, outcome = run(model, streams, name, batch, loss=RetrieverLoss(candidates=1000))
    assert (counter.host > 0) == (way in {"swap", "memo"})
    outcome.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TABLE)
def test_gradients_do_not_depend_on_how_activations_are_held(decoder, name):
    learns = {parameter: parameter.requires_grad or name == "window" for parameter in decoder[0].parameters()}
    before = {parameter: parameter.requires_grad for parameter in learns}
    for parameter, wanted in learns.items():
        parameter.requires_grad_(wanted)
    kept = gradients(decoder, name, "keep", None)
    assert kept
    for way, share in WAYS:
        found = gradients(decoder, name, way, share)
        if share == 0.5:
            for parameter, gradient in found.items():
                torch.testing.assert_close(gradient, kept[parameter], rtol=1e-5, atol=1e-7)
        else:
            assert equal(found, kept), (way, share)
    for parameter, wanted in before.items():
        parameter.requires_grad_(wanted)
