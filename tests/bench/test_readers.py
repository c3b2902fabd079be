"""All variants of reading that are timed read the same, and random memories are like written ones."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve

from mplus.bench.attention_variants import VARIANTS
from mplus.bench.fixture import BenchmarkFixture, random_rows
from mplus.bench.presets import preset
from mplus.bench.readers import BASELINES, MemoryReader, mplus_variants
from mplus.testing.rounding import allowed

pytestmark = pytest.mark.two_computations

TINY = preset("tiny")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def every_row():
    """A memory of which every read retrieves all."""
    return BenchmarkFixture(evolve(TINY, long_term_rows=TINY.retrieved_tokens), CPU)


@pytest.fixture(scope="module")
def some_rows():
    return BenchmarkFixture(TINY, CPU)


@pytest.fixture(scope="module")
def close(every_row):
    """How far two variants may be apart: see ``mplus.testing.rounding``."""
    ids = every_row.prompts(7, 1)[0]
    return {"rtol": 0.0, "atol": allowed(readers(every_row)["hf_prefix"].read(ids), every_row.in_float64().read(ids))}


def readers(fixture):
    variants = [*mplus_variants("sdpa"), *mplus_variants("reference"), *BASELINES]
    return {one.name: one.make(fixture, 32) for one in variants if one.compared}


def test_all_variants_read_the_same(every_row, close):
    ids = every_row.prompts(7, 1)[0]
    found = {name: reader.read(ids) for name, reader in readers(every_row).items()}
    assert set(found) >= {"mplus/sdpa", "mplus/mean_dot/sdpa", "mplus/reference", "hf_prefix", "floor", "published"}
    exact = every_row.in_float64().read(ids)
    for name, logits in found.items():
        assert logits.shape == (1, 1, TINY.vocab_size), name
        torch.testing.assert_close(logits.double(), exact, msg=name, **close)


def test_steps_go_on_where_the_prompt_ended(every_row, close):
    ids = every_row.prompts(9, 1)[0]
    exact = every_row.in_float64().read(ids)
    for name, reader in readers(every_row).items():
        if name == "published":
            continue
        for _ in range(2):  # again, after what was read is forgotten
            reader.reset()
            reader.read(ids[:, :7])
            reader.step(ids[:, 7:8])
            torch.testing.assert_close(reader.step(ids[:, 8:]).double(), exact, msg=name, **close)


def test_the_published_read_retrieves_what_mplus_does(some_rows, close):
    ids = some_rows.prompts(7, 1)[0]
    found = readers(some_rows)
    published = found["published"].read(ids)
    torch.testing.assert_close(found["mplus/sdpa"].read(ids), published, **close)
    torch.testing.assert_close(found["mplus/reference"].read(ids), published, **close)
    # The comparison sees what is retrieved: other rows give other logits, and another score picks other rows.
    for other in ("hf_prefix", "mplus/mean_dot/sdpa"):
        assert (found[other].read(ids) - published).abs().max() > 20 * close["atol"], other


def test_without_retrieval_the_prefix_is_as_long(some_rows):
    model, memory = some_rows.without_retrieval("sdpa")
    (view,) = memory.snapshot()
    assert model.mplus_engine.mechanism.prefix_rows(view) == TINY.prefix_rows
    assert torch.isfinite(MemoryReader(model, memory).read(some_rows.prompts(3, 1)[0])).all()


def test_the_fixtures_decoders_share_weights_and_rows(some_rows):
    one, other = some_rows.wrapped("sdpa"), some_rows.wrapped("reference", "mean_dot")
    assert one.lm_head.weight is other.lm_head.weight is some_rows.base.lm_head.weight
    rows = [some_rows.memory(model).states[0].stm[0].hidden for model in (one, other)]
    assert rows[0].data_ptr() == rows[1].data_ptr()
    for name, tensor in one.mplus.state_dict().items():
        torch.testing.assert_close(tensor, other.mplus.state_dict()[name], rtol=0, atol=0)


def test_filled_memories_are_like_written_ones(some_rows):
    model = some_rows.wrapped("sdpa")
    memory = random_rows(model.mplus_engine, 48, 20, seed=3).memory(model.mplus_engine, streams=2)
    written = memory.write(torch.randint(TINY.vocab_size, (2, TINY.chunk_tokens)))
    assert written.dropped_rows == [TINY.memory_tokens_per_chunk] * 2
    for state, store in zip(memory.states, memory.stores, strict=True):
        assert len(state.stm[0]) == TINY.short_term_tokens
        assert store.count(0) == 20 + TINY.memory_tokens_per_chunk
        ids = store.ids(0)
        rows = store.gather(0, ids)
        torch.testing.assert_close(rows.key, model.mplus_engine.keys(0, rows.hidden))
        assert int(state.stm[0].birth.max()) == state.clock - 1
    assert not torch.equal(memory.stores[0].gather(0, ids).hidden, memory.stores[1].gather(0, ids).hidden)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_attention_agree(name):
    queries, keys, values = (torch.randn(2, heads, n, 8) for heads, n in ((4, 5), (2, 21), (2, 21)))
    expected = VARIANTS["bool mask"](queries, keys, values)
    torch.testing.assert_close(VARIANTS[name](queries, keys, values), expected)
    last = VARIANTS[name](queries[:, :, -1:], keys, values)
    torch.testing.assert_close(last, expected[:, :, -1:])
