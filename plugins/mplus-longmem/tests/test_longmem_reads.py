"""What is read of a bank: by every token and head, under the gate, with a cache, in batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve
from mplus_longmem import LongMemMechanism
from mplus_longmem.bank import Bank, ChunkSearch, Heads
from mplus_longmem.side_network import Plan
from torch import Tensor

from mplus.config import Component
from mplus.evaluation.oracle import OracleMechanism
from mplus.hf.reading.override import reading_as
from mplus.mechanisms import MemoryRows, StoreLayout
from mplus.stores import STORES

HEADS = Heads(count=4, keys=2, width=3, value_width=5, tokens=4)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, text: Tensor, memory: Any, **options: Any) -> Tensor:
    found: Tensor = model(text, memory=memory, **options).logits
    return found


def test_an_empty_bank_is_the_side_network_with_the_gate_shut(model: Any) -> None:
    memory, text = model.new_memory(), ids(1, 9)
    empty = logits(model, text, memory)
    memory.write(ids(33, seed=1))
    bias = model.mplus.memory_bias
    assert not torch.equal(logits(model, text, memory), empty)
    with torch.no_grad():
        bias.fill_(-1000.0)
        shut = logits(model, text, memory)
        bias.zero_()
    assert torch.equal(shut, empty)
    assert not torch.equal(empty, logits(model, text, None)), "the side network stands in the decoder's place"


@pytest.mark.parametrize(
    ("depth", "reduction", "layer", "expected"),
    [
        (24, 2, None, (17, 8, 12, 23)),  # as published: bank of the 18th layer, read by the 9th of 12
        (5, 2, None, (2, 1, 2, 3)),  # the last side layer takes three layers
        (5, 2, 4, (4, 1, 2, 3)),  # layer 4 belongs to it, too
        (5, 1, 3, (3, 3, 5, 4)),
        (1, 1, None, (0, 0, 1, 0)),
    ],
)
def test_side_layers_share_the_decoder_among_them(depth: int, reduction: int, layer: Any, expected: Any) -> None:
    plan = Plan.of(depth, reduction, layer)
    assert (plan.bank_layer, plan.reader, len(plan.copied), plan.copied[-1]) == expected
    assert (plan.cuts[0], plan.cuts[-1]) == (0, depth)


def bank(tokens: list[int], seed: int = 0, most: int = 3) -> Bank:
    """A bank of chunks with so many tokens each, of random keys and values, of which a query reads three."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(tokens), HEADS.row, generator=generator, dtype=torch.float64)
    counts, born = torch.tensor(tokens, dtype=torch.int32), torch.arange(len(tokens))
    extra: Any = (("tokens", (), torch.int32),)
    sizes: Any = {"key_size": 6, "projected_size": HEADS.row, "keeps_hidden": False}
    layout = StoreLayout(layers=1, hidden_size=4, dtype=torch.float64, extra=extra, **sizes)
    store = STORES.build(Component("ram"), layout)
    means = HEADS.means(rows, counts)
    store.append(0, MemoryRows(None, born, born, key=means, projected=rows, extra={"tokens": counts}))
    return Bank.of(store, most)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("tokens", [[4, 4, 1, 4, 2, 4, 4], [3, 4]])
def test_every_query_reads_its_own_chunks(tokens: list[int], zeros: bool) -> None:
    """Against loops over heads and tokens."""
    found, most = bank(tokens), 3
    queries = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    read = ChunkSearch(HEADS, zeros)(queries, found, 0.5)
    keys, values = HEADS.split(found.rows())
    for head in range(4):
        own, own_values = keys[:, head // 2], values[:, head // 2]
        for place in range(2):
            query = queries[head, place]
            scores = [float(query @ chunk[:count].mean(0)) for chunk, count in zip(own, tokens, strict=True)]
            best = sorted(range(len(tokens)), key=lambda one: -scores[one])[:most]
            seen = torch.cat([own[one, : tokens[one]] for one in best])
            shown = torch.cat([own_values[one, : tokens[one]] for one in best])
            missing = HEADS.tokens * (most - len(best)) * zeros
            weights = torch.nn.functional.pad(0.5 * seen @ query, (0, missing)).softmax(0)[: len(seen)]
            assert read.places[head, place].tolist() == best + [-1] * (most - len(best)) * zeros
            assert torch.allclose(read.output[head, place], weights @ shown, atol=1e-12)


def test_a_bank_that_lies_in_pieces_reads_the_same() -> None:
    """Blocks of a store, in which others were removed, or a store that gives rows out and shows them nowhere."""
    whole = bank([4] * 9)
    store, queries = whole.store, torch.randn(4, 5, 3, dtype=torch.float64)
    blocks = STORES.build(Component("ram", {"slab_rows": 4}), store.layout)
    blocks.append(0, store.gather(0, store.ids(0)))
    for one in (blocks, store):
        one.remove(0, one.ids(0)[4:5])  # type: ignore[attr-defined]
    pieces, search = Bank.of(blocks, 3), ChunkSearch(HEADS, False)
    assert len(pieces.columns) > 1
    expected = search(queries, Bank.of(store, 3), 1.0)
    for other in (pieces, evolve(pieces, columns=(), column=None, row=None)):
        found = search(queries, other, 1.0)
        assert torch.equal(found.places, expected.places)
        assert torch.equal(found.output, expected.output)


def test_queries_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    found, search = bank([4] * 9), ChunkSearch(HEADS, False)
    queries = torch.randn(4, 7, 3, dtype=torch.float64)
    whole = search(queries, found, 1.0)
    monkeypatch.setattr("mplus_longmem.bank.MOST_SCORES", 2 * 4 * 9)
    pieces = search(queries, found, 1.0)
    assert torch.allclose(pieces.output, whole.output, atol=1e-14)
    assert torch.equal(pieces.places, whole.places)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_generation_with_a_cache_is_that_of_full_forwards(wrap: Callable[..., Any], model: Any, kind: str) -> None:
    model = model if kind == "llama" else wrap(kind)
    memory, text = model.new_memory(), ids(1, 7)
    memory.write(ids(40, seed=1))
    made = model.generate(text, memory=memory, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for place in range(7, 13):
        full = logits(model, made[:, :place], memory, use_cache=False)
        assert int(full[0, -1].argmax()) == int(made[0, place])
    beams = model.generate(text, memory=memory, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (1, 11)


def test_reads_may_bring_back_more_or_nothing(wrap: Callable[..., Any], model: Any) -> None:
    """As if the decoder had been wrapped so; of nothing that is read, the gate is shut."""
    memory, text = model.new_memory(), ids(1, 7)
    memory.write(ids(40, seed=1))
    for most in (1, 3, 10):
        other = wrap(sizes={"retrieved_tokens": most})
        told = other.new_memory()
        told.write(ids(40, seed=1))
        with reading_as(model, retrieved_tokens=most):
            assert torch.equal(logits(model, text, memory), logits(other, text, told))
    with reading_as(model, retrieved_tokens=0):
        assert torch.equal(logits(model, text, memory), logits(model, text, model.new_memory()))


def test_an_oracle_hides_what_is_not_wanted(model: Any) -> None:
    """A read that searches by itself, token by token, finds what was written from the wanted source alone."""
    memory, alone, text = model.new_memory(), model.new_memory(), ids(1, 7)
    for number in range(3):
        memory.write(ids(16, seed=number), source=str(number))
    alone.write(ids(16, seed=1), source="1")
    with reading_as(model, around=partial(OracleMechanism, wanted=[{"1"}], others=False)):
        found = logits(model, text, memory)
    assert torch.equal(found, logits(model, text, alone))
    assert not torch.equal(found, logits(model, text, memory))


def test_rows_of_a_batch_read_banks_of_their_own(model: Any) -> None:
    """One of them is empty."""
    memory, text = model.new_memory(2), ids(2, 6)
    memory.write([ids(21, seed=1), None])
    both = logits(model, text, memory)
    for row in range(2):
        alone = logits(model, text[row : row + 1], memory.select([row]))
        assert torch.allclose(both[row], alone[0], atol=1e-12)


def test_the_decoder_gets_no_gradient(model: Any) -> None:
    """Also where its parameters are not frozen; all of the side network does."""
    memory, text = model.new_memory(), ids(1, 9)
    memory.write(ids(33, seed=1))
    model(text, memory=memory, labels=text).loss.backward()
    without = [name for name, one in model.named_parameters() if one.grad is None]
    model.zero_grad()
    head = {"lm_head.weight"}  # behind the side network; frozen by whoever trains
    assert {name for name, _ in model.named_parameters() if not name.startswith("mplus.")} - set(without) <= head
    assert [name for name in without if name.startswith("mplus.")] == []


def test_new_layers_are_copies(model: Any) -> None:
    own = dict(model.named_parameters())
    for number, layer in enumerate((1, 3)):
        name = "self_attn.k_proj.weight"
        copy, source = own[f"mplus.layers.{number}.layer.{name}"], own[f"model.layers.{layer}.{name}"]
        assert copy is not source
        assert torch.equal(copy, source)


def test_the_last_chunk_may_be_shorter(model: Any) -> None:
    memory = model.new_memory()
    memory.write(ids(11, seed=1))
    assert Bank.of(memory.stores[0], 1).tokens.tolist() == [4, 4, 3]
    assert LongMemMechanism.Options.defaults("published")["drop_remainder"]
