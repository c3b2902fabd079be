"""The retriever "attention" in real decoders: their own queries and keys, without positions."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import ARCHITECTURES, BY_NAME, Architecture
from benchmarks.quality.architectures.retrofitted import CHUNK, SIZES, config_for, retrofit
from mplus.errors import MemoryMismatchError, NotSupported
from mplus.hf.retrofit.attention_probe import OwnAttention
from mplus.retrievers.attention import AttentionRetriever
from mplus.retrievers.base import RetrieverShape
from tests.hf.references import ids, stir

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.two_computations

BY_ITSELF = {"falcon-new", "falcon-multi-query", "bloom", "diffllama", "gptj", "codegen"}
"""Attend by themselves, so that only their cache can be looked into."""
TEXT = ids(1, 9)
CHUNKS = ids(1, 6 * CHUNK, seed=1)[0]


def heads_of(projection: Any, hidden: torch.Tensor, heads: int, norm: Any = None) -> torch.Tensor:
    """``[n, heads, D]``, with the read adapter written out."""
    weight = projection.weight
    if hasattr(projection, "lora_A"):
        low, high = projection.lora_A["read"].weight, projection.lora_B["read"].weight
        weight = weight + projection.scaling["read"] * high @ low
    states = (hidden @ weight.T).view(len(hidden), heads, -1)
    return states if norm is None else norm(states)


def slow_scores(attention: Any, text: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Head by head, token by token, for attention with projections q_proj and k_proj and four heads over two."""
    queries = heads_of(attention.q_proj, text, 4, getattr(attention, "q_norm", None))
    keys = heads_of(attention.k_proj, rows, 2, getattr(attention, "k_norm", None))
    shares = [
        torch.softmax((keys[:, head // 2] @ token[head]) * attention.scaling, 0)
        for token in queries
        for head in range(4)
    ]
    return torch.stack(shares).mean(0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite"])
def test_scores_are_the_layers_attention_without_positions(name: str) -> None:
    model = stir(retrofit(BY_NAME[name], retriever="attention").wrapped)
    engine, retriever = model.mplus_engine, model.mplus.retriever
    generator = torch.Generator().manual_seed(0)
    text, rows = torch.randn(5, 32, generator=generator), torch.randn(11, 32, generator=generator)
    with torch.no_grad():
        for spec in engine.retrofit.anatomy.specs:
            layer = spec.memory_index
            queries = retriever.project_queries(layer, text[None])
            keys = retriever.project_keys(layer, rows)
            mask = torch.ones(1, 5, dtype=torch.bool)
            found = retriever.score(layer, queries, mask, keys[None])[0]
            torch.testing.assert_close(found, slow_scores(spec.attention, text, rows), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(found.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.refused is None], ids=str)
def test_every_decoder_that_shows_its_queries(architecture: Architecture) -> None:
    config = config_for(architecture, retriever="attention", adapters=None)
    model = architecture.build()
    if architecture.name in BY_ITSELF:
        with pytest.raises(NotSupported, match=f"{type_of_attention(model)} attends by itself .* 'linear'"):
            mplus.wrap(model, config)
        assert not hasattr(model, "mplus")
        return
    mplus.wrap(model, config, check=False)
    retriever, layout = model.mplus.retriever, model.mplus_engine.layout
    assert layout.key_size == retriever.key_size > 0
    hidden = torch.randn(1, 3, layout.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in range(layout.layers):
            keys, turned = (retriever.project_keys(layer, rows) for rows in (hidden[0], hidden[0].flip(0)))
            assert torch.allclose(keys, turned.flip(0), atol=1e-5), "a key depends on the place of its row"
            assert retriever.project_queries(layer, hidden).shape == (1, 3, retriever.query_size)


def type_of_attention(model: Any) -> str:
    names = [type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Attention")]
    return names[0]


def written(model: Any) -> mplus.Memory:
    memory: mplus.Memory = model.new_memory()
    memory.write(CHUNKS, source="book")
    return memory


def read(model: Any, memory: mplus.Memory) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TEXT, memory=memory).logits
    return logits


def test_keys_are_those_of_the_rows_and_reading_goes_by_them() -> None:
    model = stir(retrofit(BY_NAME["llama"], retriever="attention").wrapped)
    memory = written(model)
    store, engine = memory.stores[0], model.mplus_engine
    for spec in engine.retrofit.anatomy.specs:
        rows = store.gather(spec.memory_index, store.ids(spec.memory_index))
        expected = heads_of(spec.attention.k_proj, spec.norm(rows.hidden), 2).flatten(1)
        torch.testing.assert_close(rows.key, expected.detach(), atol=1e-5, rtol=1e-4)
    found = model.generate(
        TEXT, memory=memory, max_new_tokens=1, return_dict_in_generate=True, output_sources=True
    ).memory_sources
    assert len(found[0][0]) == SIZES["retrieved_tokens"]
    assert all(0 < one.score < 1 for layer in found[0] for one in layer)


def test_is_saved_with_the_memory_and_the_model(tmp_path: Path) -> None:
    model = stir(retrofit(BY_NAME["llama"], retriever="attention").wrapped)
    memory = written(model)
    expected = read(model, memory)
    memory.save(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model", save_base=True)
    loaded = mplus.from_pretrained(tmp_path / "model")
    again = mplus.Memory.load(tmp_path / "memory", loaded)
    torch.testing.assert_close(read(loaded, again), expected)
    through: Any = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(read(through, written(through)), expected)
    linear = stir(retrofit(BY_NAME["llama"], retriever={"name": "linear", "width": 16}).wrapped)
    with pytest.raises(MemoryMismatchError, match=r"retriever\.keys is .* in the file and None in the model"):
        mplus.Memory.load(tmp_path / "memory", linear)


def test_reads_rows_of_another_retriever_once_it_knows_the_decoder() -> None:
    model = retrofit(BY_NAME["llama"]).wrapped
    retriever = AttentionRetriever(RetrieverShape(layers=3, hidden_size=32))
    with pytest.raises(NotSupported, match=r"'attention' works with the attention of a decoder: .*attach\(retriever\)"):
        retriever.project_queries(0, torch.zeros(1, 2, 32))
    model.mplus_engine.attach(retriever)
    assert retriever.key_size == 16
    assert retriever.project_keys(1, torch.zeros(0, 32)).shape == (0, 16)


def test_an_attention_that_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = retrofit(BY_NAME["llama"]).wrapped
    decoder = OwnAttention(model.mplus_engine)
    attention = model.mplus_engine.retrofit.anatomy.specs[1].attention

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("cache_position")

    monkeypatch.setattr(attention, "forward", broken)
    assert decoder.heads(0).width == 8
    with pytest.raises(NotSupported, match=r"LlamaAttention of layer 1 outside a forward.* KeyError: 'cache_position'"):
        decoder.heads(1)
    monkeypatch.undo()
    own = attention.forward

    def placed(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"]
        place = torch.arange(hidden.shape[1])[None, :, None]
        return own(*args, **{**kwargs, "hidden_states": hidden * (1 + place)})

    monkeypatch.setattr(attention, "forward", placed)
    with pytest.raises(NotSupported, match="layer 1 gives equal rows unequal queries or keys"):
        decoder.heads(1)
