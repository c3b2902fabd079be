"""A side network that gives the final hidden state, as LongMem has, against the same written out in plain torch."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import MechanismError, NotSupported
from mplus.hf.model.static_reader import StaticReader
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.mechanisms import MECHANISMS
from mplus.testing.rounding import InFloat64, allowed, error
from mplus.training.decoder import make_streams
from tests.mechanisms.reading.side_network import BANK_LAYER, CUTS, HEADS, SIZE, TOP, SideMechanism

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

TOLD = "Lily found a small key under the blue stone. Her dog Max barked at the red bird in the tree. "
ASKED = "One day, Lily wanted to open the box, but she did not have"


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    MECHANISMS.register("side", SideMechanism)
    yield
    MECHANISMS.unregister("side")


@functools.cache
def wrapped(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    sizes = {"chunk_tokens": 16, "min_chunk_tokens": 1, "retrieved_tokens": 16}
    model = mplus.wrap(load_decoder().to(dtype), {"mechanism": "side", **sizes})
    with torch.no_grad():
        for name, parameter in model.mplus.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1 if name == "gate" else parameter.shape[-1] ** -0.5))
    return model


def ids(text: str) -> Tensor:
    return load_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def written(model: Any, rows: int = 1) -> mplus.Memory:
    memory = model.new_memory(rows)
    memory.write([ids(TOLD)[0, 3 * row :] for row in range(rows)])
    return memory


@torch.no_grad()
def logits(model: Any, text: Tensor, memory: Any = None, **options: Any) -> Tensor:
    found: Tensor = model(text, memory=memory, **options).logits
    return found


@torch.no_grad()
def states_of(plain: Any, text: Tensor) -> list[Tensor]:
    """What each layer receives for ids ``[1, T]``, and what the last one gives: ``[T, d]`` each."""
    found: list[Tensor] = []
    layers = plain.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, output: found.append(output[0])))
    plain(text)
    for hook in hooks:
        hook.remove()
    return found


def normed(rows: Tensor) -> Tensor:
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


@torch.no_grad()
def reference(plain: Any, side: Any, told: Tensor, text: Tensor) -> Tensor:
    """``[T, V]`` without mplus and without a cache; the network attends token by token and head by head."""
    layer = plain.model.layers[BANK_LAYER]
    first = torch.tensor([[plain.config.bos_token_id]])
    bank = torch.cat([states_of(plain, torch.cat([first, chunk], 1))[BANK_LAYER][1:] for chunk in told.split(16, 1)])
    bank = layer.input_layernorm(bank)
    keys, values = (
        (bank @ part.weight.T).view(-1, HEADS, SIZE) for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    states = states_of(plain, text)
    hidden, tokens = states[0], text.shape[1]
    for number, own in enumerate(side.layers):
        inside = normed(hidden)
        q, k, v = ((inside @ part.weight.T).view(tokens, HEADS, SIZE) for part in (own.query, own.key, own.value))
        rows = []
        for t in range(tokens):
            for h in range(HEADS):
                distance = torch.arange(t + 1) - t
                found = (k[: t + 1, h] @ q[t, h] / SIZE**0.5 + (0.1 * distance).to(q)).softmax(0) @ v[: t + 1, h]
                if number == 1:
                    best = (keys[:, h] @ q[t, h]).topk(TOP)
                    far = (best.values / SIZE**0.5).softmax(0) @ values[best.indices, h]
                    found = (1 - side.gate[h].sigmoid()) * found + side.gate[h].sigmoid() * far
                rows.append(found)
        attended = torch.stack(rows).view(tokens, -1) @ own.out.weight.T
        hidden = hidden + attended + own.down(torch.nn.functional.gelu(own.up(inside)))
        hidden = hidden + states[CUTS[number + 1]] - states[CUTS[number]]
    found = plain.lm_head(normed(hidden))
    assert isinstance(found, torch.Tensor)
    return found


def plain_of(model: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The decoder alone and the side network, in another dtype."""
    return load_decoder().to(model.dtype).to(dtype), copy.deepcopy(model.mplus).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_the_paper_says(dtype: torch.dtype) -> None:
    model, told, text = wrapped(dtype), ids(TOLD), ids(ASKED)
    with InFloat64():
        exact = reference(*plain_of(model, torch.float64), told, text)
    allow = allowed(reference(*plain_of(model, dtype), told, text), exact)
    assert error(logits(model, text, written(model))[0], exact) <= allow
    assert error(logits(model, text, model.new_memory())[0], exact) > allow
    assert error(logits(model, text)[0], exact) > allow


def close(found: Tensor, wanted: Tensor) -> bool:
    """Of logits in float32, which are of size 20, computed in other shapes."""
    return error(found, wanted) <= 64 * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def test_tokens_behind_a_cache_are_as_in_a_full_forward() -> None:
    model, text = wrapped(), ids(ASKED)
    memory, whole = written(model), logits(model, text, written(model))
    with torch.no_grad():
        cache = model(text[:, :9], memory=memory).past_key_values
        twin = copy.deepcopy(cache)
        pieces = [model(text[:, 9:12], memory=memory, past_key_values=cache).logits]
        ones = text[:, 12:].split(1, 1)
        pieces += [model(one, memory=memory, past_key_values=cache).logits for one in ones]
        assert close(torch.cat(pieces, 1), whole[:, 9:])
        assert close(model(text[:, 9:], memory=memory, past_key_values=twin).logits, whole[:, 9:])
        cache.crop(9 - text.shape[1])
        cache.batch_repeat_interleave(2)
        both = model(text[:, 9:].expand(2, -1), memory=memory, past_key_values=cache).logits
        assert close(both, whole[:, 9:].expand(2, -1, -1))


def test_rows_of_a_batch_are_as_alone_with_padding_on_the_left() -> None:
    model, text = wrapped(), ids(ASKED)
    memory = written(model, 2)
    padded = torch.cat([text, text.roll(3, 1)])
    padded[1, :3] = 0
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    found = logits(model, padded, memory, attention_mask=mask)
    assert close(found[:1], logits(model, text, memory.select([0])))
    alone = logits(model, padded[1:, 3:], memory.select([1]))
    assert close(found[1:, 3:], alone)
    steps = {"memory": memory, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    made = model.generate(padded, **steps)
    assert made.tolist() == model.generate(padded, use_cache=False, **steps).tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beams", "samples"],
)
def test_a_generation_is_what_it_is_without_a_cache(options: dict[str, Any]) -> None:
    model, text = wrapped(), ids(ASKED)
    made = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        settings = {"do_sample": False, "max_new_tokens": 8, "use_cache": use_cache, **options}
        made.append(model.generate(text, memory=written(model), **settings).tolist())
    assert made[0] == made[1]


def test_guessed_tokens_leave_nothing_behind() -> None:
    model, memory = wrapped(), written(wrapped())
    text = torch.cat([ids(ASKED), ids(ASKED)], 1)
    steps = {"memory": memory, "max_new_tokens": 12, "do_sample": False}
    assert model.generate(text, prompt_lookup_num_tokens=4, **steps).tolist() == model.generate(text, **steps).tolist()


def test_only_the_side_network_gets_gradients() -> None:
    model, text = wrapped(), ids(ASKED)
    trained = dict(model.mplus.named_parameters())
    model.requires_grad_(False)
    model.mplus.requires_grad_(True)
    model(text, labels=text, memory=written(model)).loss.backward()
    assert [name for name, one in trained.items() if one.grad is None or not bool(one.grad.any())] == []
    others = [name for name, one in model.named_parameters() if ".mplus." not in f".{name}" and one.grad is not None]
    assert others == []
    model.zero_grad()


def test_without_a_memory_and_unwrapped_the_decoder_is_as_it_was() -> None:
    torch.manual_seed(3)
    plain, text = load_decoder(), ids(ASKED)
    model = mplus.wrap(load_decoder(), {"mechanism": "side", "chunk_tokens": 16, "retrieved_tokens": 16})
    assert torch.equal(logits(model, text), plain(text).logits)
    assert torch.equal(mplus.unwrap(model)(text).logits, plain(text).logits)
    assert not model.model._forward_hooks


def test_a_final_hidden_state_of_another_shape_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = wrapped(), written(wrapped())
    monkeypatch.setattr(SideMechanism, "finish", lambda _, __, result, ___: result.need_hidden()[:, :1])
    with pytest.raises(MechanismError, match=r"'side' must return the final hidden state as torch.float32 \[1, "):
        logits(model, ids(ASKED), memory)


def test_a_static_cache_is_refused_by_name() -> None:
    with pytest.raises(NotSupported, match="the memory 'side' changes the final hidden state of every token"):
        StaticReader(wrapped())


def test_training_reads_what_a_forward_reads() -> None:
    model, text = wrapped(), ids(ASKED)
    found = make_streams(model.mplus_engine, [0], seed=0).read(text[None]).logits[0]
    assert close(found, logits(model, text, model.new_memory()))
    found.logsumexp(-1).sum().backward()
    layers = dict(model.mplus.layers.named_parameters())
    assert [name for name, one in layers.items() if one.grad is None or not bool(one.grad.any())] == []
    model.zero_grad()
