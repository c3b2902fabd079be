"""Tokens from a plain decoder with a static cache are those of the wrapped one, compiled in one graph or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BOS, BY_NAME
from benchmarks.quality.architectures.retrofitted import Pair, retrofit
from mplus.errors import InputError, MemoryMismatchError, NotSupported
from mplus.hf.model.static_reader import StaticReader
from tests.helpers.docstrings import run_examples
from tests.hf.references import TOLERANCE, error, ids, stir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.two_computations

STEPS = 5


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(name: str, **changes: Any) -> Pair:
    pair = retrofit(BY_NAME[name], **changes)
    stir(pair.wrapped)
    pair.wrapped.eval()
    return pair


def compare(pair: Pair, reader: StaticReader, memory: mplus.Memory, prompt: torch.Tensor, state: Any) -> None:
    """Every step against the wrapped decoder with a cache of its own."""
    model = pair.wrapped
    expected = model(prompt, memory=memory, use_cache=True)
    assert error(state.logits, expected.logits[:, -1]) < TOLERANCE
    for number in range(STEPS):
        token = ids(prompt.shape[0], 1, seed=40 + number)
        expected = model(token, memory=memory, past_key_values=expected.past_key_values)
        assert error(reader.step(state, token), expected.logits[:, -1]) < TOLERANCE


# With the four below all that are taken.
FURTHER = ("mistral", "qwen2", "phi3", "gpt2", "opt", "opt-post-norm", "olmo2", "mixtral")
FURTHER += ("qwen3-moe", "granite", "smollm3", "stablelm")


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3", "gpt-neox", "phi", *(pytest.param(name, marks=pytest.mark.nightly) for name in FURTHER)],
)
def test_steps_are_those_of_the_wrapped_decoder(name: str) -> None:
    pair = made(name)
    memory = pair.new_memory(batch_size=2)
    memory.write(ids(2, 100, seed=5))
    reader, prompt = StaticReader(pair.wrapped), ids(2, 7, seed=3)
    state = reader.prefill(prompt, memory=memory, room=STEPS)
    assert state.memory_rows > 0
    compare(pair, reader, memory, prompt, state)
    assert state.room == 0
    with pytest.raises(InputError, match="no room for another token"):
        reader.step(state, prompt[:, :1])
    alone = pair.wrapped(prompt).logits
    assert error(reader.decoder(prompt).logits, alone) > TOLERANCE, "the reading adapter is merged"
    assert torch.equal(pair.wrapped(prompt).logits, alone), "and the wrapped decoder is as it was"
    run_examples(StaticReader, mplus=mplus, model=pair.wrapped, memory=memory, prompt=prompt)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_steps_behind_a_memory_in_the_middle_of_a_prompt(name: str) -> None:
    sizes = {"chunk_tokens": 8, "retrieved_tokens": 16, "long_term_tokens": 40}
    model = mplus.wrap(BY_NAME[name].build(0), {"mechanism": {"name": "kv", "retrieved_chunks": None}, **sizes})
    memory, told = model.new_memory(2), ids(2, 16, seed=5)
    memory.write(told)
    prompt = torch.cat([torch.full((2, 1), BOS), told[:, [2, 3, 9, 12]]], 1)
    reader = StaticReader(model)
    state = reader.prefill(prompt, memory=memory, room=STEPS)
    assert state.memory_rows == 16
    output = model(prompt, memory=memory, use_cache=True)
    for number in range(STEPS):
        token = ids(2, 1, seed=40 + number)
        output = model(token, memory=memory, past_key_values=output.past_key_values)
        assert error(reader.step(state, token), output.logits[:, -1]) < TOLERANCE


def test_one_graph_serves_prompt_after_prompt() -> None:
    torch._dynamo.reset()
    pair, graphs = made("llama"), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    reader = StaticReader(pair.wrapped, {"backend": count, "fullgraph": True})
    memory, state = pair.new_memory(), None
    for number in range(3):
        memory.write(ids(1, 100, seed=number))
        prompt = ids(1, 6 + number, seed=9 + number)
        state = reader.prefill(prompt, memory=memory, room=20 if state is None else 0, into=state)
        compare(pair, reader, memory, prompt, state)
        if number == 0:
            after_the_first = len(graphs)
    assert 1 <= after_the_first <= 2  # positions become a variable at the second step
    assert len(graphs) == after_the_first
    torch._dynamo.reset()


def test_what_a_plain_decoder_cannot_do_is_refused() -> None:
    for name, reason in (("bloom", "ALiBi"), ("gemma2", "layers of other kinds"), ("jamba", "carry no memory")):
        with pytest.raises(NotSupported, match=reason):
            StaticReader(made(name).wrapped)
    latent = made("deepseek-v3")
    memory = latent.new_memory()
    memory.write(ids(1, 60))
    with pytest.raises(NotSupported, match="something else than its keys"):
        StaticReader(latent.wrapped).prefill(ids(1, 7), memory=memory)
    pair = made("llama")
    with pytest.raises(NotSupported, match="it is not wrapped"):
        StaticReader(pair.plain)
    reader, memory, prompt = StaticReader(pair.wrapped), pair.new_memory(), ids(1, 7)
    memory.write(ids(1, 60))
    state = reader.prefill(prompt, memory=memory, room=2)
    with pytest.raises(InputError, match=r"ids must be \[1, 1\]"):
        reader.step(state, prompt)
    with pytest.raises(InputError, match="into must have a cache of 1 rows with room for"):
        reader.prefill(ids(1, 12), memory=memory, into=state)
    with pytest.raises(InputError, match="room must be at least 0"):
        reader.prefill(prompt, memory=memory, room=-1)
    ragged = pair.new_memory(batch_size=2)
    ragged.write([ids(1, 60)[0], None])
    with pytest.raises(NotSupported, match="rows of different number"):
        reader.prefill(ids(2, 7), memory=ragged)
    pair.wrapped.get_input_embeddings().weight.mul_(1)
    layer = pair.wrapped.model.layers[0].self_attn.q_proj
    layer.weight.mul_(2)
    with pytest.raises(MemoryMismatchError, match="weights have changed"):
        reader.prefill(prompt, memory=memory)
