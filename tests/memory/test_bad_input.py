"""Whatever is handed in wrongly is refused by name, rule and value, and the memory stays as it was."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME, VOCAB_SIZE
from mplus.errors import (
    ConfigError,
    InputError,
    MemoryMismatchError,
    MissingDependencyError,
    MPlusError,
    NonFiniteError,
    UnknownNameError,
)
from mplus.memory.writing.update import Update
from mplus.stores import STORES
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mplus.memory import Memory


@pytest.fixture(scope="module")
def written() -> Memory:
    return tiny.written("paper", [140, 60])


@pytest.fixture
def memory(written: Memory) -> Memory:
    """Of each test alone."""
    return written.fork()


def refused(memory: Memory, kind: type[MPlusError], message: str, call: Callable[[], Any]) -> None:
    """``call`` raises, says so, and changes nothing: rows, stores, sources, generators, version."""
    before, version = tiny.content(memory), memory.version
    with pytest.raises(kind, match=message):
        call()
    tiny.assert_content(memory, before)
    assert memory.version == version


BAD_DATA: list[tuple[Any, str]] = [
    (["", ""], "nothing to write"),
    ([None, None], "nothing to write"),
    ([], "nothing to write"),
    (torch.empty(2, 0, dtype=torch.int64), "nothing to write"),
    ([[], []], "nothing to write"),
    (["text", "text"], "writing text needs a tokenizer"),
    (torch.zeros(2, 8), r"whole numbers, got dtype torch\.float32"),
    (torch.zeros(2, 8, dtype=torch.bool), r"whole numbers, got dtype torch\.bool"),
    ([[1.5] * 8, [1.5] * 8], r"whole numbers, got dtype torch\.float32"),
    ([["a"] * 8, [2] * 8], r"a list of whole numbers, got \['a'"),
    ([[2**70] * 8, [2] * 8], "a list of whole numbers, got"),
    ([[[1, 2], [3]], [2] * 8], r"a list of whole numbers, got \[\[1, 2\]"),
    ([{"input_ids": ["a"]}, None], "a list of whole numbers, got 'a'"),
    ([[[2] * 8], [[2] * 8]], r"must have shape \[n\], got \[1, 8\]"),
    (torch.zeros(2, 2, 8, dtype=torch.int64), r"shape \[n\] or \[batch, n\], got \[2, 2, 8\]"),
    (torch.tensor(5), r"shape \[n\] or \[batch, n\], got \[\]"),
    (5, "text, ids, chat messages or a list of them, got int"),
    ({"ids": [2] * 8}, r"must have 'input_ids'.*got the keys \['ids'\]: put chat messages into a list"),
    (b"bytes of a text", "text, ids, chat messages or a list of them, got bytes"),
    ([2] * 8, r"one text per batch row \(2\), got 1"),
    (tiny.prompts(3), r"one text per batch row \(2\), got 3"),
    ([tiny.ids(8), [5] * 6 + [VOCAB_SIZE]], "vocabulary, 0 to 100, got 101 at position 6"),
    ([[5] * 40 + [-1], tiny.ids(8)], "vocabulary, 0 to 100, got -1 at position 40"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DATA, ids=lambda value: re.sub(r"\W+", "-", str(value))[:50])
def test_text_and_ids(data: Any, message: str, memory: Memory) -> None:
    refused(memory, InputError, message, lambda: memory.write(data))


@pytest.mark.parametrize("data", ["", None, [], [""], [[]], torch.empty(0), torch.empty(1, 0)], ids=repr)
def test_nothing(data: Any) -> None:
    memory = tiny.variant("paper").new_memory()
    refused(
        memory,
        InputError,
        "there is nothing to write" if data is not None else "got NoneType",
        lambda: memory.write(data),
    )


BAD_CHUNKS: list[tuple[Any, str]] = [
    (tiny.prompts(2, 3), r"min_chunk_tokens to chunk_tokens \(4 to 16\) tokens, got 3: use write"),
    (tiny.prompts(2, 17), "got 17"),
    (tiny.prompts(2, 0), "got 0"),
    (tiny.prompts(1, 8), r"a tensor of shape \[2, n\], got \[1, 8\]"),
    (tiny.ids(8), r"got \[8\]"),
    (tiny.prompts(2, 8).tolist(), "got list"),
    (tiny.prompts(2, 8).float(), "whole numbers"),
    (torch.full((2, 8), 101), "got 101 at position 0 of batch row 0"),
]


@pytest.mark.parametrize(("chunk", "message"), BAD_CHUNKS, ids=lambda value: re.sub(r"\W+", "-", str(value))[:50])
def test_chunks(chunk: Any, message: str, memory: Memory) -> None:
    refused(memory, InputError, message, lambda: memory.write_chunk(chunk))


def test_sources_and_rows(memory: Memory) -> None:
    good = tiny.prompts(2, 8)
    refused(memory, InputError, "source must be a text or None, got 7", lambda: memory.write(good, source=7))  # type: ignore[arg-type]
    refused(memory, InputError, r"one per batch row \(2\), got 3", lambda: memory.write(good, source=["a"] * 3))
    refused(memory, InputError, "got b'x'", lambda: memory.write_chunk(good, source=b"x"))  # type: ignore[arg-type]
    refused(memory, InputError, r"\('first', 'zweite Quelle'\), got 'third'", lambda: memory.forget("third"))
    refused(memory, InputError, "row must be a batch row, 0 to 1, got 2", lambda: memory.forget("first", row=2))
    refused(memory, InputError, "row must be a batch row, 0 to 1, got -1", lambda: memory.sources(-1))
    memory.forget("first")
    refused(memory, InputError, r"\('zweite Quelle'\), got 'first'", lambda: memory.forget("first"))


# ---------------------------------------------------------------------- numbers out of the decoder


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.down_proj.weight", r"NaN or Inf in layer 1 .*torch\.float32"),
        ("model.layers.2.self_attn.q_proj.lora_B.write.weight", "NaN or Inf in layer 2"),
        ("mplus.mark", "NaN or Inf in layer 0"),
        ("mplus.retriever.key_proj.2.2.weight", "NaN or Inf in the retriever keys of layer 2"),
    ],
)
def test_a_decoder_that_computes_no_numbers(value: float, name: str, message: str) -> None:
    model = tiny.build()
    memory = model.new_memory(batch_size=2)
    memory.write(tiny.prompts(2, 60))
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = value
    refused(memory, NonFiniteError, message, lambda: memory.write(tiny.prompts(2, 16)))
    refused(memory, NonFiniteError, message, lambda: memory.write_chunk(tiny.prompts(2, 16)))


def test_the_chunks_before_a_bad_one_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build()
    memory, expected = model.new_memory(), model.new_memory()
    expected.write(tiny.ids(48)[:32])
    own, calls = model.mplus_engine.write, []

    def overflowing(views: Any, ids: Any, *rest: Any) -> Any:
        calls.append(ids)
        made = own(views, ids, *rest)
        return Update(tuple(block * torch.inf for block in made.hidden)) if len(calls) == 3 else made

    monkeypatch.setattr(model.mplus_engine, "write", overflowing)
    with pytest.raises(NonFiniteError):
        memory.write(tiny.ids(48))
    tiny.assert_same(memory, expected)
    assert memory.version == 2


# ---------------------------------------------------------------------- memories that do not fit


def test_batch_sizes(memory: Memory) -> None:
    model, prompt = tiny.variant("paper"), tiny.prompts(3)
    for call in (lambda: model(prompt, memory=memory), lambda: model.generate(prompt, memory=memory, max_new_tokens=2)):
        refused(memory, MemoryMismatchError, "the batch has 3 rows and the memory 2", call)
    for wrong in (0, -1, True, 1.0, "2", None):
        with pytest.raises(ConfigError, match=f"batch_size must be a whole number of at least 1, got {wrong!r}"):
            model.new_memory(batch_size=wrong)


def test_memory_of_another_model(memory: Memory) -> None:
    other, prompt = tiny.build(), tiny.prompts(2)
    message = "belongs to another model: make it with this model's new_memory, or save it and load it"
    refused(memory, MemoryMismatchError, message, lambda: other(prompt, memory=memory))
    refused(memory, MemoryMismatchError, message, lambda: other.generate(prompt, memory=memory, max_new_tokens=2))
    with pytest.raises(MemoryMismatchError, match=r"must be an mplus\.Memory, got dict"):
        other(prompt, memory={})


def test_memory_of_another_dtype(memory: Memory) -> None:
    model, half = tiny.variant("paper"), memory.to(dtype=torch.float16)
    message = r"holds torch\.float16 and the model computes in torch\.float32: use memory\.to\(dtype=torch\.float32\)"
    refused(half, MemoryMismatchError, message, lambda: half.write(tiny.prompts(2)))
    refused(half, MemoryMismatchError, message, lambda: half.write_chunk(tiny.prompts(2)))
    refused(half, MemoryMismatchError, message, lambda: model(tiny.prompts(2), memory=half))
    half.to(dtype=torch.float32).write(tiny.prompts(2))


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((f, v, f"{f} must be a whole number of at least 1") for v in (0, -3, 1.5, True, "4")
          for f in ("chunk_tokens", "min_chunk_tokens", "memory_tokens_per_chunk", "short_term_tokens")),
        ("retrieved_tokens", -1, "retrieved_tokens must be a whole number of at least 0, got -1"),
        ("long_term_tokens", -1, "long_term_tokens must be a whole number of at least 0, or None, got -1"),
        ("query_tokens", 0, "query_tokens must be a whole number of at least 1, or None, got 0"),
        ("memory_tokens_per_chunk", 13, r"must not exceed short_term_tokens \(12\), got 13: one write must fit"),
        ("min_chunk_tokens", 17, r"must not exceed chunk_tokens \(16\), got 17"),
        ("variant", "papers", "variant must be one of 'paper', 'published', got 'papers'"),
        ("adapters", {"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ("short_tern_tokens", 5, "did you mean 'short_term_tokens'"),
        ("store", 5, "a name or a table with a 'name'"),
    ],
)  # fmt: skip
def test_sizes(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        mplus.MPlusConfig.from_dict({**tiny.SIZES, field: value})
    assert repr(value) in str(caught.value) or field == "short_tern_tokens" or isinstance(value, dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "rma"}, "store is called 'rma'.*'ram'"),
        ({"retriever": "liner"}, "retriever is called 'liner'.*'linear'"),
        ({"mechanism": "mpluss"}, "mechanism is called 'mpluss'.*'mplus'"),
        ({"eviction": "fifa"}, "eviction policy is called 'fifa'.*'fifo'"),
        ({"backend": "spda"}, "backend is called 'spda'.*'sdpa'"),
    ],
)
def test_names(changes: dict[str, Any], message: str) -> None:
    model = BY_NAME["llama"].build()
    before = model.state_dict().keys()
    with pytest.raises(UnknownNameError, match=message):
        mplus.wrap(model, mplus.MPlusConfig.from_dict({**tiny.SIZES, **changes}))
    assert type(model).__mro__[1].__name__ != "MemoryModel"
    assert model.state_dict().keys() == before


def test_names_of_one_memory() -> None:
    model = tiny.variant("paper")
    with pytest.raises(UnknownNameError, match="did you mean"):
        model.new_memory(store="rma")
    with pytest.raises(UnknownNameError, match="fifo"):
        model.new_memory(eviction={"name": "filo"})
    with pytest.raises(ConfigError, match="growth must be a finite number above 1, got 1"):
        model.new_memory(store={"name": "ram", "growth": 1})
    with pytest.raises(ConfigError, match=r"'growht' is not a field of .*did you mean 'growth'"):
        model.new_memory(store={"name": "ram", "growht": 2})


def test_a_store_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store_on_faiss.py").write_text("import faiss\nfrom mplus.stores.ram import RamStore as FaissStore\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    STORES.register("on-faiss", "store_on_faiss:FaissStore")
    try:
        with pytest.raises(MissingDependencyError, match=r"'on-faiss' needs the package 'faiss'.*mplus\[faiss\]"):
            tiny.variant("paper").new_memory(store="on-faiss")
    finally:
        STORES.unregister("on-faiss")
