"""A memory of keys and values is trained: adapters learn through the rows that they wrote."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.errors import ConfigError
from mplus.hf.decoders.train_model import choose_trained
from mplus.testing.rounding import InFloat64
from mplus.training import train
from mplus.training.batch import Batch
from mplus.training.decoder import TrainedDecoder, make_streams
from mplus.training.objectives import OBJECTIVES
from tests.mechanisms.kv.memories import CHUNK, text, wrapped
from tests.memory import tiny
from tests.training.recipes import recipe

if TYPE_CHECKING:
    from torch import Tensor

STREAMS, TOKENS = 2, 5


def decoder(**changes: Any) -> Any:
    """Wrapped for training in float64, with adapters that are not zero."""
    model = wrapped(adapters={"rank": 2, **changes.pop("adapters", {})}, **changes)
    model.double()
    trained = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def batch(chunks: int = 2) -> Batch:
    ids = torch.stack([text(STREAMS * CHUNK, seed).view(STREAMS, CHUNK) for seed in range(chunks)], 1)
    texts = ids[:, :1, :TOKENS]  # what was written first is asked for
    return Batch(
        chunks=ids,
        sources=torch.arange(chunks).expand(STREAMS, -1),
        texts=texts,
        labels=texts,
        mask=torch.ones_like(texts, dtype=torch.bool),
        text_sources=torch.zeros(STREAMS, 1, dtype=torch.int64),
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_the_decoder_reading_the_text(architecture: str) -> None:
    """With one adapter, every chunk behind all others, and all of them brought back: two ways to compute one thing.

    One rotates keys, and the other has learned positions, so that texts begin behind their rows.
    """
    model, given = decoder(architecture=architecture, context_chunks=None, adapters={"shared": True}), batch()
    engine = model.mplus_engine
    streams = make_streams(engine, range(STREAMS), seed=0)
    plain = [torch.full((STREAMS, 1), engine.decoder.shape.first_token), given.chunks.flatten(1), given.texts[:, 0]]
    with InFloat64():
        for place in range(2):
            streams.write(
                given.chunks[:, place], torch.zeros(STREAMS, dtype=torch.int64)
            )  # a chunk is behind its own source
        memory = streams.read(given.texts).logits[:, 0]
        read = engine.decoder.run(torch.cat(plain, 1), adapter="write", collect={"logits"}).logits[:, -TOKENS:]
        ours, decoders = (gradients(logits.square().mean(), model) for logits in (memory, read))
    torch.testing.assert_close(memory, read, rtol=0, atol=1e-9)
    assert ours.keys() == decoders.keys()
    for name, gradient in decoders.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-9, msg=name)
    assert all(bool(ours[name].any()) for name in ours if ".0." in name)


@pytest.mark.parametrize(
    ("name", "options", "learning"),
    [
        ("single_context", {"chunks": 2}, {"write", "read"}),
        ("multi_chunk", {"chunks": 2}, {"read"}),  # rows are written without gradient
        ("two_chunk", {"reader": "read"}, {"write", "read"}),
        ("two_chunk", {"reader": "write"}, {"write", "read"}),  # a row's keys are made as the reader would make them
        ("plain_lm", {}, {"read"}),
    ],
)
def test_objectives_train_the_adapters_that_they_say(name: str, options: dict[str, Any], learning: set[str]) -> None:
    model, cls = decoder(), OBJECTIVES.get(name)
    streams = make_streams(model.mplus_engine, range(STREAMS), seed=0)
    with torch.no_grad():
        streams.write(text(STREAMS * CHUNK, 9).view(STREAMS, CHUNK), torch.full((STREAMS,), 7))
    outcome = cls(cls.Options(**options))(TrainedDecoder(model), streams, batch(), None)
    found = gradients(outcome.loss, model)
    moved = {adapter for adapter in ("write", "read") for n, g in found.items() if f".{adapter}." in n and g.any()}
    assert moved == learning


def test_the_loss_of_a_fixed_batch_falls() -> None:
    model, objective = decoder(), OBJECTIVES.get("single_context")(OBJECTIVES.get("single_context").Options(chunks=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        streams = make_streams(model.mplus_engine, range(STREAMS), seed=0)
        loss = objective(TrainedDecoder(model), streams, batch(), None).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_saved_streams_go_on_as_they_would_have() -> None:
    model = decoder()
    streams, twin = (make_streams(model.mplus_engine, range(STREAMS), seed=0) for _ in range(2))
    with torch.no_grad():
        streams.write(batch().chunks[:, 0], torch.zeros(STREAMS, dtype=torch.int64))
        twin.load_state_dict(copy.deepcopy(streams.state_dict()))
        for each in (streams, twin):
            each.write(batch().chunks[:, 1], torch.ones(STREAMS, dtype=torch.int64))
        assert torch.equal(streams.read(batch().texts).logits, twin.read(batch().texts).logits)


def kv_recipe(**settings: Any) -> dict[str, Any]:
    """A recipe for the shipped decoder, frozen, with a memory of keys and values and nothing said of adapters."""
    table = recipe(("stages.1.retriever_loss",), **{"optimizer__parameters": "adapters", **settings})
    table["memory"] = {"mechanism": "kv", "chunk_tokens": 12, "retrieved_tokens": 24, "long_term_tokens": 48}
    table["memory"] |= {"adapters": False} if settings.get("memory__adapters") is False else {}
    table["stages"] = table["stages"][:1]
    table["model"] = {"path": "recall-tiny"}  # saved with M+, whose begin rows and retriever mean nothing here
    return table


def test_mplus_train_gives_it_adapters_and_trains_nothing_else() -> None:
    result = train(kv_recipe(), steps=1)
    assert all(map(math.isfinite, result.metrics.values()))
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    assert any(".lora_B.write." in name for name in trained)
    assert all(".lora_" in name or name.startswith("mplus.") for name in trained)
    moved = dict(result.model.named_parameters())
    first = [name for name in trained if ".layers.0." in name and ".lora_B." in name]  # these began as zero
    assert all(bool(moved[name].any()) for name in first)
    assert result.recipe.to_dict()["memory"]["adapters"]["rank"] == 16


def test_without_adapters_a_recipe_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"optimizer: parameters must be 'all' .* mechanism 'kv' has no parameters"):
        train(kv_recipe(memory__adapters=False))
    with pytest.raises(ConfigError, match="'kv' has no parameters of its own"):
        choose_trained(wrapped(adapters=None), "adapters")


def test_without_adapters_the_decoder_itself_can_be_trained() -> None:
    result = train(kv_recipe(memory__adapters=False, optimizer__parameters="all"), steps=1)
    assert all(map(math.isfinite, result.metrics.values()))


def test_its_texts_are_read_in_training_as_by_a_user() -> None:
    model = decoder().eval()
    memory = model.new_memory(batch_size=STREAMS, seed=0)
    streams = make_streams(model.mplus_engine, range(STREAMS), seed=0)
    given = batch()
    with torch.no_grad():
        for place in range(2):
            streams.write(given.chunks[:, place], given.sources[:, place])
            memory.write_chunk(given.chunks[:, place])
        expected = model(input_ids=given.texts[:, 0], memory=memory).logits
        torch.testing.assert_close(streams.read(given.texts).logits[:, 0], expected, rtol=0, atol=tiny.rounding())
