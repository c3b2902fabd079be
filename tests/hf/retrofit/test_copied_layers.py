"""Copies of a decoder's layers run beside it as the layers themselves do, with parameters of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import SIZES
from mplus.backends.base import AttentionRequest, AttentionResult
from mplus.errors import NotSupported
from mplus.hf.retrofit.attention_probe import Nothing
from mplus.hf.retrofit.context import Collection, Pass, run_in
from mplus.mechanisms.decoder import Attend, Compute
from mplus.mechanisms.opened import TokenTensors
from tests.hf.references import TOLERANCE, error, ids

DECODERS = ("llama", "mistral-sliding", "qwen3", "gemma3", "gpt2", "opt", "opt-post-norm")


def wrapped(name: str) -> Any:
    return mplus.wrap(BY_NAME[name].build(), SIZES)


def observed(model: Any, text: Tensor, **options: Any) -> Collection:
    """What the layers received and gave, and how they were called."""
    found = Collection(frozenset({"hidden", "calls"}))
    with torch.no_grad():
        run_in(Pass(Nothing(), None, collection=found), model, input_ids=text, **options)
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_a_copy_gives_what_its_layer_gives(name: str) -> None:
    model, text = wrapped(name), ids(2, 11)
    copies, decoder = model.mplus_engine.shape.copies, model.mplus_engine.retrofit.anatomy.decoder
    full = observed(model, text, use_cache=False)
    with torch.no_grad():
        last = decoder(text).last_hidden_state
        assert torch.equal(copies.final_norm()(full.hidden_states[-1]), last)
        for index in range(len(full.calls)):
            copy, received = copies.layer(index), full.hidden_states[index]
            assert torch.equal(copy(received, full.calls[index]), full.hidden_states[index + 1])
            assert all(one.requires_grad for one in copy.parameters())
            kept, parts = TokenTensors(), []
            cached: dict[str, Any] = {}
            for piece in (text[:, :6], *text[:, 6:].split(1, 1)):
                step = observed(model, piece, use_cache=True, **cached)
                cached["past_key_values"] = cached.get("past_key_values") or _cache_of(step)
                parts.append(copy(step.hidden_states[index], step.calls[index], kept))
            assert error(torch.cat(parts, 1), full.hidden_states[index + 1]) <= TOLERANCE


def _cache_of(step: Collection) -> Any:
    from transformers import Cache

    call = step.calls[0]
    return next(one for one in (*call.args, *call.kwargs.values()) if isinstance(one, Cache))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_copy_attends_in_a_way_of_its_own(name: str) -> None:
    """Half of what its attention gives: that of the decoder's own layer stays as it is."""
    model, text = wrapped(name), ids(1, 5)
    copy, full = model.mplus_engine.shape.copies.layer(1), observed(model, text, use_cache=False)
    queries: list[Tensor] = []

    def attending(hidden: Tensor) -> Attend:
        def attend(request: AttentionRequest, compute: Compute) -> AttentionResult:
            queries.extend((request.queries, copy.unrotated(request.queries, hidden)))
            return evolve(compute(request), output=compute(request).output / 2)

        return attend

    with torch.no_grad():
        moved = copy(full.hidden_states[1], full.calls[1], None, attending)
    assert error(moved, full.hidden_states[2]) > 100 * TOLERANCE
    assert torch.equal(observed(model, text, use_cache=False).hidden_states[2], full.hidden_states[2])
    given, still = queries
    assert error(still[:, :, :1], given[:, :, :1]) <= TOLERANCE, "the first token sits at position 0"
    assert (error(still[:, :, 1:], given[:, :, 1:]) > 100 * TOLERANCE) == (name == "llama")


def test_a_copy_computes_in_the_dtype_of_its_parameters() -> None:
    model, text = wrapped("llama"), ids(1, 5)
    full = observed(model, text, use_cache=False)
    copy = model.mplus_engine.shape.copies.layer(0).double()
    with torch.no_grad():
        found = copy(full.hidden_states[0], full.calls[0])
    assert found.dtype == torch.float64
    assert error(found.float(), full.hidden_states[1]) <= TOLERANCE


def test_a_layer_without_a_key_value_cache_is_refused() -> None:
    copies = wrapped("llama").mplus_engine.shape.copies
    with pytest.raises(NotSupported, match=r"^layer 7 of LlamaForCausalLM cannot be copied"):
        copies.layer(7)
