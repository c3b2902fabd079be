"""Rows that step together say what each of them says alone, whatever joins or leaves beside it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import ConfigError, InputError, MemoryMismatchError, NotSupported
from mplus.hf.batch import row_buffer
from mplus.hf.batch.requests import RowRequest
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.helpers.docstrings import run_examples
from tests.hf.batch.alone import Alone, Company, alone
from tests.hf.batch.readers import fresh, memories, wrapped
from tests.hf.references import TOLERANCE, error
from tests.memory.tiny import build, ids

pytestmark = pytest.mark.two_computations

NEW = 8


def asking(model: Any, rows: list[tuple[Any, int]], **options: Any) -> tuple[list[RowRequest], list[Alone]]:
    """Requests for pairs of memory and length of prompt, and what each is alone."""
    options = {"max_new_tokens": NEW, **options}
    asked = [RowRequest(memory, ids(size, seed=300 + size), **options) for memory, size in rows]
    return asked, [alone(model, one, NEW) for one in asked]


@pytest.mark.parametrize("mechanism", ["mplus", "memoryllm", "kv"])
def test_rows_of_unequal_memories_and_texts_are_those_of_generate(mechanism: str) -> None:
    model = wrapped(mechanism)
    empty, small, large = memories(model)
    company = Company(mplus.BatchReader(model))
    assert not company.reader.slow_because
    company.join(*asking(model, [(empty, 9), (large, 5), (None, 3), (None, 6)]))
    for _ in range(3):
        company.step()
    rows = company.join(*asking(model, [(small, 90), (large, 1), (large, 5)]))
    assert [row.prompt_tokens for row in rows] == [90, 1, 5]
    assert rows[0].memory_version == small.version
    found = {one.source for layer in rows[0].sources for one in layer}
    assert found == (set() if mechanism == "memoryllm" else {"source 1"})
    company.leave([rows[1]])
    company.finish()
    assert company.reader.nbytes == 0


def test_the_text_of_a_trained_decoder() -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    sizes = {"memory_tokens_per_chunk": 8, "short_term_tokens": 48, "retrieved_tokens": 24, "long_term_tokens": 500}
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(chunk_tokens=32, retriever="linear", **sizes)).eval()
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("Tom had a red ball. He lost it in the park. A big dog found the ball and ran away with it. " * 6)
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "The dog said", "Tom was sad because his")]
    own = [alone(model, RowRequest(memory, prompt), 20).tokens for prompt in prompts]
    reader = mplus.BatchReader(model)
    rows = reader.join([(memory, prompt) for prompt in prompts])
    said = {row: [int(row.logits.argmax())] for row in rows}
    for _ in range(19):
        logits = reader.step([said[row][-1] for row in reader.rows])
        for row, token in zip(reader.rows, logits.argmax(-1).tolist(), strict=True):
            said[row].append(token)
    assert [said[row] for row in rows] == own
    run_examples(mplus.BatchReader, mplus=mplus, model=model, memory=memory, prompt=prompts[0])


def test_copies_share_a_prompt_and_go_on_by_themselves() -> None:
    model = wrapped("mplus")
    memory, reader = memories(model)[1], mplus.BatchReader(model)
    rows = reader.join([RowRequest(memory, ids(6), copies=3), RowRequest(memory, ids(6), copies=2, retrieve_every=9)])
    assert reader.rows == rows
    assert all(error(row.logits, rows[0].logits) < TOLERANCE for row in rows)
    found = reader.step([3, 4, 3, 4, 3])
    assert error(found[2], found[0]) < TOLERANCE > error(found[3], found[1])
    assert error(found[1], found[0]) > TOLERANCE
    assert error(found[4], found[0]) < TOLERANCE
    reader.leave(rows[0])
    assert reader.rows == [rows[2], rows[1], *rows[3:]], "the last one of the batch takes the place"
    again = reader.step([5, 6, 6, 5])
    assert error(again[2], again[1]) < TOLERANCE > error(again[3], again[0])


def test_a_bad_row_does_not_keep_others_from_joining() -> None:
    model, other = wrapped("mplus"), wrapped("foreign")
    memory, reader = memories(model)[1], mplus.BatchReader(model)
    (first,) = reader.join([(memory, ids(4))])
    asked = [
        (other.new_memory(), ids(4)),
        (memory, ids(5)),
        (memory, []),
        (memory, [10**6]),
        (model.new_memory(2), ids(3)),
        RowRequest(memory, ids(3), min_score=0.5),
        (memory, ids(9)),
    ]
    rows = reader.join(asked)
    assert reader.rows == [first, rows[1], rows[6]]
    expected = [MemoryMismatchError, None, InputError, InputError, MemoryMismatchError, NotSupported, None]
    assert [None if row.error is None else type(row.error) for row in rows] == expected
    with pytest.raises(MemoryMismatchError, match="belongs to another model"):
        _ = rows[0].logits
    with pytest.raises(ConfigError, match="copies"):
        RowRequest(memory, [1], copies=0)
    wrong = (([1], r"tokens must be \[3\] ids"), ([1, -1, 2], "ids from 0"), ([0.5, 1.0, 1.0], "ids, one for"))
    for tokens, message in wrong:
        with pytest.raises(InputError, match=message):
            reader.step(tokens)
    with pytest.raises(InputError, match="must be among"):
        reader.leave([first, rows[0]])
    assert reader.rows == [first, rows[1], rows[6]]


def test_a_step_that_fails_leaves_all_rows_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("mplus")
    company = Company(mplus.BatchReader(model))
    company.join(*asking(model, [(memory, 5 + size) for size, memory in enumerate(memories(model))]))
    company.step()
    update, calls = row_buffer.RowLayer.update, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return update(self, *args, **kwargs)

    monkeypatch.setattr(row_buffer.RowLayer, "update", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        company.reader.step([1, 1, 1])
    company.leave(company.reader.rows[:1])
    company.finish()


def test_what_is_written_later_does_not_reach_a_row() -> None:
    model = wrapped("mplus")
    memory, company = memories(model)[1], Company(mplus.BatchReader(model))
    (row,) = company.join(*asking(model, [(memory, 6)]))
    writer = threading.Thread(target=lambda: [memory.write(ids(30, seed=seed)) for seed in range(4)])
    writer.start()
    company.finish()
    writer.join()
    assert memory.version > row.memory_version


def test_changed_weights_are_refused() -> None:
    model = fresh()
    memory, reader = memories(model)[1], mplus.BatchReader(model)
    reader.join([(memory, ids(6))])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(MemoryMismatchError, match="weights have changed since this BatchReader"):
        reader.join([(memory, ids(6))])
    assert len(reader.rows) == 1
    with pytest.raises(NotSupported, match="not wrapped"):
        mplus.BatchReader(BY_NAME["llama"].build(0))
    with pytest.raises(NotSupported, match="eval mode"):
        mplus.BatchReader(model.train())


def test_nothing_of_a_row_that_left_reaches_the_next_in_its_place() -> None:
    model = wrapped("mplus")
    company = Company(mplus.BatchReader(model))
    _, last = company.join(*asking(model, [(None, 50), (None, 40)]))
    for layer in company.reader._stepped._buffers[-1]._layers:
        layer.keys[1], layer.values[1] = torch.inf, torch.nan
    company.leave([last])
    company.join(*asking(model, [(None, 3)]))
    company.finish()


def test_half_precision() -> None:
    model = build(dtype=torch.bfloat16).eval()
    made = memories(model)
    reader = mplus.BatchReader(model)
    rows = reader.join([(memory, ids(7, seed=size)) for size, memory in enumerate([*made, None])])
    alone_logits = [
        model(ids(7, seed=size)[None], memory=memory).logits[0, -1] for size, memory in enumerate([*made, None])
    ]
    spread = torch.stack(alone_logits).float().std()
    for row, own in zip(rows, alone_logits, strict=True):
        assert error(row.logits.float(), own.float()) < 16 * torch.finfo(torch.bfloat16).eps * max(spread, 1)
    assert reader.step([1, 2, 3, 4]).dtype == torch.bfloat16
