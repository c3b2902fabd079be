"""Rows that step together say what each of them says alone, whatever joins or leaves beside it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import ConfigError, InputError, MemoryMismatchError, NotSupported
from mplus.hf.batch.requests import Row, RowRequest
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.helpers.docstrings import run_examples
from tests.hf.batch.alone import Alone, alone, join, run
from tests.memory.tiny import build, ids, variant

NEW = 8

MECHANISMS: dict[str, dict[str, Any]] = {
    "mplus": {},
    "memoryllm": {"mechanism": "memoryllm"},
    "kv": {"mechanism": {"name": "kv", "retrieved_chunks": None}, "retrieved_tokens": 32},
}


def wrapped(name: str) -> Any:
    if name != "kv":
        return build(**MECHANISMS[name]).eval()
    return mplus.wrap(
        BY_NAME["llama"].build(0), {"chunk_tokens": 16, "long_term_tokens": 200, **MECHANISMS[name]}
    ).eval()


def memories(model: Any, sizes: tuple[int, ...] = (0, 100, 190)) -> list[Any]:
    made = []
    for seed, size in enumerate(sizes):
        memory = model.new_memory(seed=seed)
        if size:
            memory.write(ids(size, seed=50 + seed), source=f"source {seed}")
        made.append(memory)
    return made


def asking(model: Any, rows: list[tuple[Any, int]]) -> tuple[list[Any], list[Alone]]:
    """Requests for pairs of memory and length of prompt, and what each is alone."""
    asked = [RowRequest(memory, ids(size, seed=300 + size), max_new_tokens=NEW) for memory, size in rows]
    return asked, [alone(model, one.memory, one.ids, NEW) for one in asked]


@pytest.mark.parametrize("name", MECHANISMS)
def test_rows_of_unequal_memories_and_texts_are_those_of_generate(name: str) -> None:
    model = wrapped(name)
    empty, small, large = memories(model)
    reader = mplus.BatchReader(model)
    assert not reader.slow_because
    answers: dict[Row, Alone] = {}
    places: dict[Row, int] = {}
    join(reader, answers, places, *asking(model, [(empty, 9), (large, 5), (None, 3)]))
    for _ in range(3):
        run(reader, answers, places)
    rows = join(reader, answers, places, *asking(model, [(small, 90), (large, 1), (large, 5)]))
    assert [row.prompt_tokens for row in rows] == [90, 1, 5]
    assert rows[0].memory_version == small.version
    if name != "memoryllm":
        assert {one.source for layer in rows[0].sources for one in layer} == {"source 1"}
    reader.leave(rows[1])
    while reader.rows:
        run(reader, answers, places)
    assert len(answers) == 6
    assert reader.nbytes == 0


def test_the_text_of_a_trained_decoder() -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    sizes = {"memory_tokens_per_chunk": 8, "short_term_tokens": 48, "retrieved_tokens": 24, "long_term_tokens": 500}
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(chunk_tokens=32, retriever="linear", **sizes)).eval()
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("Tom had a red ball. He lost it in the park. A big dog found the ball and ran away with it. " * 6)
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "The dog said", "Tom was sad because his")]
    own = [alone(model, memory, prompt, 20).tokens for prompt in prompts]
    reader = mplus.BatchReader(model)
    rows = reader.join([(memory, prompt) for prompt in prompts], max_new_tokens=20)
    said = {row: [int(row.logits.argmax())] for row in rows}
    for _ in range(19):
        logits = reader.step([said[row][-1] for row in reader.rows])
        for row, token in zip(reader.rows, logits.argmax(-1).tolist(), strict=True):
            said[row].append(token)
    assert [said[row] for row in rows] == own
    run_examples(mplus.BatchReader, mplus=mplus, model=model, memory=memory, prompt=prompts[0])


def test_copies_share_a_prompt_and_go_on_by_themselves() -> None:
    model = wrapped("mplus")
    _, memory, _ = memories(model)
    reader = mplus.BatchReader(model)
    one, two = reader.join([RowRequest(memory, ids(6), copies=2)])
    assert torch.equal(one.logits, two.logits)
    first, second = reader.step([3, 4])
    for token, found in ((3, first), (4, second)):
        (single,) = mplus.BatchReader(model).join([(memory, [*ids(6).tolist(), token])])
        assert not torch.equal(found, single.logits)  # it retrieved with one token more, so this is no equal text
    assert not torch.equal(first, second)
    reader.leave(one)
    (again,) = reader.step([7])
    other = mplus.BatchReader(model)
    other.join([(memory, ids(6))])
    other.step([4])
    assert torch.allclose(again, other.step([7])[0], atol=1e-5)


def test_a_bad_row_does_not_keep_others_from_joining() -> None:
    model, other = wrapped("mplus"), build(seed=3)
    memory = memories(model)[1]
    reader = mplus.BatchReader(model)
    (first,) = reader.join([(memory, ids(4))])
    several = model.new_memory(2)
    asked = [(other.new_memory(), ids(4)), (memory, ids(5)), (memory, []), (memory, [10**6]), (several, ids(3))]
    rows = reader.join(asked)
    assert reader.rows == [first, rows[1]]
    expected = [MemoryMismatchError, None, InputError, InputError, MemoryMismatchError]
    assert [None if row.error is None else type(row.error) for row in rows] == expected
    with pytest.raises(MemoryMismatchError, match="belongs to another model"):
        _ = rows[0].logits
    with pytest.raises(ConfigError, match="copies"):
        RowRequest(memory, [1], copies=0)
    for tokens, message in (([1], r"tokens must be \[2\] ids"), ([1, -1], "ids from 0"), ([0.5, 1.0], "ids, one for")):
        with pytest.raises(InputError, match=message):
            reader.step(tokens)
    with pytest.raises(InputError, match="must be among"):
        reader.leave([first, rows[0]])
    assert reader.rows == [first, rows[1]]


def test_what_is_written_later_does_not_reach_a_row() -> None:
    model = wrapped("mplus")
    memory = memories(model)[1]
    reader = mplus.BatchReader(model)
    own = alone(model, memory, ids(6).tolist(), NEW)
    answers: dict[Row, Alone] = {}
    places: dict[Row, int] = {}
    (row,) = join(reader, answers, places, [(memory, ids(6))], [own])
    writer = threading.Thread(target=lambda: [memory.write(ids(30, seed=seed)) for seed in range(4)])
    writer.start()
    while reader.rows:
        run(reader, answers, places)
    writer.join()
    assert memory.version > row.memory_version


def test_changed_weights_are_refused() -> None:
    model = wrapped("mplus")
    memory = memories(model)[1]
    reader = mplus.BatchReader(model)
    reader.join([(memory, ids(6))])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(MemoryMismatchError, match="weights have changed since this BatchReader"):
        reader.join([(memory, ids(6))])
    assert len(reader.rows) == 1
    with pytest.raises(NotSupported, match="not wrapped"):
        mplus.BatchReader(BY_NAME["llama"].build(0))
    with pytest.raises(NotSupported, match="eval mode"):
        mplus.BatchReader(build().train())


def test_a_joining_reads_prompt_after_prompt() -> None:
    model = variant("paper").eval()
    memory = memories(model)[1]
    reader = mplus.BatchReader(model)
    joining = reader.begin([(memory, ids(6)), (None, ids(3)), (memory, ids(9))])
    assert not joining.advance(6)
    assert reader.rows == joining.rows[:1]
    reader.step([5])
    assert not joining.advance(1)
    assert joining.advance(1)
    assert joining.done
    assert set(reader.rows) == set(joining.rows)
