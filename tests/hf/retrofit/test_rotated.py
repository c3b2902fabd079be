"""Queries and keys that are turned further, and how large token embeddings are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import mplus
from mplus.errors import NotSupported

if TYPE_CHECKING:
    from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "a part of every head": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, rotary_pct=0.5)),
}


def wrapped(decoder: nn.Module) -> Any:
    return mplus.wrap(decoder.eval(), mplus.MPlusConfig(mechanism="kv", chunk_tokens=8))


@pytest.mark.parametrize("kind", DECODERS)
def test_queries_and_keys_are_turned_as_the_layer_does(kind: str) -> None:
    """Keys that lie at 0 and are turned are those that a pass makes there, and turning back undoes it."""
    model = wrapped(DECODERS[kind]())
    decoder, hidden = model.mplus_engine.decoder, torch.randn(2, 5, 32)
    positions = torch.tensor([0, 1, 7, -3, 40])
    with torch.no_grad():
        rows = decoder.kept.rows(0, hidden)
        at = decoder.kept.turned(0, [rows], decoder.kept.tables(0, rows, positions[None])).keys
        still = decoder.kept.turned(0, [rows], None).keys
        assert torch.allclose(decoder.rotated(0, still, positions), at, atol=1e-5)
        assert torch.allclose(decoder.rotated(0, at, -positions), still, atol=1e-5)
    more = torch.randn(1, 7, 5, still.shape[3], requires_grad=True)  # as many heads as there are
    decoder.rotated(0, more, positions).square().sum().backward()
    assert torch.allclose(more.grad, 2 * more, atol=1e-4), "a rotation keeps lengths"


def test_a_decoder_that_turns_nothing_leaves_them() -> None:
    model = wrapped(
        GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=50, bos_token_id=1, eos_token_id=2)
        )
    )
    part = torch.randn(1, 2, 3, 8)
    assert torch.equal(model.mplus_engine.decoder.rotated(0, part, torch.arange(3)), part)


def test_positions_that_move_with_the_text_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    decoder = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval()
    model = mplus.wrap(decoder, mplus.MPlusConfig(chunk_tokens=8))
    with pytest.raises(NotSupported, match="frequencies depend"):
        model.mplus_engine.decoder.rotated(0, torch.zeros(1, 1, 1, 8), torch.zeros(1, dtype=torch.int64))


def test_how_large_token_embeddings_are() -> None:
    decoder = DECODERS["llama"]()
    with torch.no_grad():
        decoder.get_input_embeddings().weight.normal_(0, 0.3)
    assert wrapped(decoder).mplus_engine.shape.embedding_std == pytest.approx(0.3, rel=0.1)
