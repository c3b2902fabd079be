"""``torch.compile`` around a wrapped decoder or inside it: memory is read and written uncompiled, and correctly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import CompileConfig

from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import BY_NAME, Architecture
from benchmarks.quality.architectures.retrofitted import CHUNK, Pair, retrofit
from tests.hf.references import TOLERANCE, error, ids, merged, stir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.two_computations

TEXT = ids(1, 9)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def shallow(name: str) -> Architecture:
    """With two layers: every layer takes as long to compile as the one before."""
    architecture = BY_NAME[name]
    return replace(architecture, options={**architecture.options, "num_hidden_layers": 2})


def compiled(model: Any, what: str) -> Any:
    """The model to call, some part of it compiled (without a code generator, which would need a C++ compiler)."""
    match what:
        case "model":
            return torch.compile(model, backend="eager")
        case "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        case "decoder":
            model.get_decoder().compile(backend="eager")
        case "layers":
            for layer in model.mplus_engine.retrofit.anatomy.layers:
                layer.compile(backend="eager")
    return model


def rows_of(pair: Pair, memory: Any) -> list[torch.Tensor]:
    return [torch.cat([b, s.hidden]) for b, s in zip(pair.begin, memory.states[0].stm, strict=True)]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llama", "model"),
        pytest.param("llama", "forward", marks=pytest.mark.nightly),  # what "model" compiles, called by another name
        pytest.param("llama", "decoder", marks=pytest.mark.nightly),
        pytest.param("llama", "layers", marks=pytest.mark.nightly),
        pytest.param("falcon-new", "model", marks=pytest.mark.nightly),
        ("falcon-new", "layers"),  # whose memory is read through its cache
    ],
)
def test_compiled_decoders_write_and_read(name: str, what: str) -> None:
    pair = retrofit(shallow(name), long_term_tokens=0)
    stir(pair.wrapped)
    alone, expected = pair.wrapped(TEXT).logits, pair.memory(chunks=2)
    reader = merged(pair.plain, pair.wrapped, "read")
    model = compiled(pair.wrapped, what)
    assert error(model(TEXT).logits, alone) < TOLERANCE
    memory = pair.memory(chunks=2)
    for found, row in zip(memory.states[0].stm, expected.states[0].stm, strict=True):
        assert error(found.hidden, row.hidden) < TOLERANCE
    for _ in range(2):  # one memory after the other, with a text in between that has none
        assert error(model(TEXT, memory=memory).logits, oracle.read(reader, TEXT, rows_of(pair, memory))) < TOLERANCE
        assert error(model(TEXT).logits, alone) < TOLERANCE
        memory.write(ids(1, CHUNK, seed=7))


def test_static_cache_generation_that_compiles_by_itself() -> None:
    """What transformers does on its own on a GPU."""
    pair = retrofit(shallow("llama"), long_term_tokens=0)
    stir(pair.wrapped)
    memory = pair.memory(chunks=2)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 5, "do_sample": False}
    expected = oracle.generate_greedy(merged(pair.plain, pair.wrapped, "read"), TEXT, rows_of(pair, memory), 5)
    assert torch.equal(pair.wrapped.generate(TEXT, memory=memory, **options), expected)
    alone = shallow("llama").build().generate(TEXT, max_new_tokens=5, do_sample=False)
    assert torch.equal(pair.wrapped.generate(TEXT, **options), alone)


def test_one_graph_is_refused_by_torch_and_not_wrong() -> None:
    pair = retrofit(shallow("llama"), long_term_tokens=0)
    memory = pair.memory(chunks=2)
    model = torch.compile(pair.wrapped, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(TEXT, memory=memory)
