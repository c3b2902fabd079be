"""Dense streams hold what memories hold, and are read as memories are read."""

from __future__ import annotations

import pytest
import torch

from mplus.errors import ConfigError, InputError
from mplus.mechanisms.short_term.batched_prefix import ScoreSelector
from mplus.training.decoder import TrainedDecoder, make_batched_streams
from tests.memory import tiny

pytestmark = pytest.mark.two_computations

SEED = 3


def written(model, *, streams=3, chunks=14, tokens=tiny.CHUNK, capacity=tiny.CAPACITY):
    """A memory and dense streams that were written the same chunks; drops fill the LTM past its capacity."""
    memory = model.new_memory(batch_size=streams, seed=SEED)
    dense = make_batched_streams(model.mplus_engine, range(streams), seed=SEED, long_term_tokens=capacity)
    generator = torch.Generator().manual_seed(7)
    for batch in range(chunks):
        ids = torch.randint(2, tiny.VOCAB_SIZE, (streams, tokens), generator=generator)
        memory.write_chunk(ids, source=f"chunk {batch}")
        with torch.no_grad():
            dense.write(ids, torch.full((streams,), batch))
    return memory, dense


def same_rows(dense_row, rows):
    hidden, source, birth = dense_row
    order, wanted = birth.argsort(), rows.birth.argsort()
    assert torch.equal(birth[order], rows.birth[wanted])
    assert torch.equal(source[order], rows.source[wanted])
    torch.testing.assert_close(hidden[order], rows.hidden[wanted], rtol=0, atol=tiny.rounding())


@pytest.mark.parametrize(
    "changes", [{}, {"drop_per_layer": False}, {"long_term_tokens": 22}, {"adapters": None}], ids=str
)
def test_streams_hold_what_a_memory_holds(changes):
    model = tiny.build(**changes)
    memory, dense = written(model, capacity=changes.get("long_term_tokens", tiny.CAPACITY))
    for layer in range(model.mplus_engine.layout.layers):
        for row, view in enumerate(memory.snapshot()):
            stm = (dense.stm[layer][row], dense.stm_source[layer][row], dense.stm_birth[layer][row])
            same_rows(stm, view.state.stm[layer])
            ltm = dense.ltm[layer]
            rows = view.store.gather(layer, view.store.ids(layer))
            same_rows((ltm.hidden[row], ltm.source[row], ltm.birth[row]), rows)


def test_short_chunks_reencode_old_rows_as_a_memory_does():
    model = tiny.build(min_chunk_tokens=1)
    memory, dense = written(model, tokens=2)
    view = memory.snapshot()[1]
    stm = (dense.stm[2][1], dense.stm_source[2][1], dense.stm_birth[2][1])
    same_rows(stm, view.state.stm[2])


@pytest.mark.parametrize("name", ["llama", "constant", "compressed"])
def test_streams_are_read_as_memories_are(name):
    positions = {"constant": {"memory_positions": "constant"}, "llama": {}}
    changes = positions.get(name, {"memory_positions": "compressed", "position_span": 5})
    model = tiny.build(**changes).eval()
    memory, dense = written(model)
    texts = torch.randint(2, tiny.VOCAB_SIZE, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    retriever = model.mplus_engine.mechanism.retriever
    with torch.no_grad():
        read = TrainedDecoder(model).read(dense, texts, selector=ScoreSelector(retriever))
        for place in range(2):
            expected = model(input_ids=texts[:, place], memory=memory).logits
            torch.testing.assert_close(read.logits[:, place], expected, rtol=0, atol=tiny.rounding())
    assert all(seen.selected.shape == (3, 2, tiny.K0) for seen in read.layers.values())


def test_what_retrieval_may_not_see_does_not_change_what_is_picked():
    model = tiny.build().eval()
    _, dense = written(model)
    texts = torch.randint(2, tiny.VOCAB_SIZE, (3, 2, 6), generator=torch.Generator().manual_seed(1))
    other = texts.clone()
    other[..., 4:] = 2
    query_mask = torch.arange(6).expand_as(texts) < 4
    picker = ScoreSelector(model.mplus_engine.mechanism.retriever)
    with torch.no_grad():
        first, second = (
            TrainedDecoder(model).read(dense, t, queries=query_mask, selector=picker) for t in (texts, other)
        )
        seeing = TrainedDecoder(model).read(dense, other, selector=picker)
    assert all(torch.equal(first.layers[i].selected, second.layers[i].selected) for i in first.layers)
    assert any(not torch.equal(first.layers[i].selected, seeing.layers[i].selected) for i in first.layers)


def test_a_stream_does_the_same_in_every_process_layout():
    model = tiny.build()
    _, together = written(model)
    alone = make_batched_streams(model.mplus_engine, [2], seed=SEED, long_term_tokens=tiny.CAPACITY)
    generator = torch.Generator().manual_seed(7)
    for batch in range(14):
        ids = torch.randint(2, tiny.VOCAB_SIZE, (3, tiny.CHUNK), generator=generator)
        with torch.no_grad():
            alone.write(ids[2:], torch.tensor([batch]))
    for layer in range(3):
        assert torch.equal(alone.stm_birth[layer][0], together.stm_birth[layer][2])
        torch.testing.assert_close(alone.stm[layer][0], together.stm[layer][2], rtol=0, atol=tiny.rounding())


def test_a_saved_state_goes_on_as_the_streams_would_have():
    model = tiny.build()
    _, dense = written(model)
    twin = make_batched_streams(model.mplus_engine, range(3), seed=99, long_term_tokens=tiny.CAPACITY)
    twin.load_state_dict(dense.state_dict())
    ids = torch.randint(2, tiny.VOCAB_SIZE, (3, tiny.CHUNK))
    with torch.no_grad():
        dense.write(ids, torch.tensor([1, 2, 3]))
        twin.write(ids, torch.tensor([1, 2, 3]))
    for layer in range(3):
        assert torch.equal(dense.stm[layer], twin.stm[layer])
        assert torch.equal(dense.ltm[layer].hidden, twin.ltm[layer].hidden)
        assert torch.equal(dense.ltm[layer].source, twin.ltm[layer].source)


def test_gradient_flows_through_short_term_rows_until_detached():
    model = tiny.build()
    dense = make_batched_streams(model.mplus_engine, range(2), seed=0, long_term_tokens=8)
    for batch in range(5):
        dense.write(torch.randint(2, tiny.VOCAB_SIZE, (2, tiny.CHUNK)), torch.tensor([batch, batch]))
    assert all(rows.requires_grad for rows in dense.stm)
    assert not any(rows.hidden.requires_grad for rows in dense.ltm)
    dense.detach()
    assert not any(rows.requires_grad for rows in dense.stm)


def test_bad_streams_are_refused():
    model = tiny.build()
    with pytest.raises(ConfigError, match="at least one stream, got none"):
        make_batched_streams(model.mplus_engine, [], seed=0, long_term_tokens=0)
    with pytest.raises(ConfigError, match="variant 'paper', got 'published'"):
        make_batched_streams(tiny.variant("published").mplus_engine, [0], seed=0, long_term_tokens=0)
    dense = make_batched_streams(model.mplus_engine, [0, 1], seed=0, long_term_tokens=0)
    with pytest.raises(InputError, match=r"chunks must be \[2, 1 to chunk_tokens \(16\)\], got \[3, 4\]"):
        dense.write(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="must be 2 with 3 layers, got 1 with 3"):
        dense.load_state_dict(make_batched_streams(model.mplus_engine, [0], seed=0, long_term_tokens=0).state_dict())
