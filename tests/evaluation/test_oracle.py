"""The oracle brings back what was written from the sources it is told, and fills up with others."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mplus.errors import InputError
from mplus.evaluation.oracle import OracleMechanism, written_from
from mplus.hf.reading.override import mechanism_for_reads, reading_as
from tests.memory.tiny import K0, ids, prompts, variant


def told(name):
    """Two streams, five sources of one chunk each, in different order."""
    memory = variant(name).new_memory(batch_size=2, seed=3)
    for place in range(5):
        names = [f"s{place}", f"s{4 - place}"]
        memory.write([ids(16, 10 + place), ids(16, 20 + place)], source=names)
    memory.write([ids(96, 1), ids(96, 2)], source="rest")  # pushes them out of the STM
    return memory


def sources(memory, wanted):
    model = memory.engine.model
    with reading_as(model, around=partial(OracleMechanism, wanted=wanted)):
        output = model.generate(
            input_ids=prompts(2), memory=memory, max_new_tokens=1, return_dict_in_generate=True, output_sources=True
        )
    return [[[row.source for row in layer] for layer in row] for row in output.memory_sources]


@pytest.mark.parametrize("name", ["paper", "published"])
def test_wanted_rows_come_back(name):
    memory = told(name)
    wanted = [{"s1"}, {"s0", "s4"}]
    for row, (found, names) in enumerate(zip(sources(memory, wanted), wanted, strict=True)):
        view = memory.snapshot()[row]
        for layer, retrieved in enumerate(found):
            store = memory.engine.mechanism.searched(view, layer)
            there = int(written_from(view, store, layer, names).sum())
            assert there
            assert sum(source in names for source in retrieved) == min(there, K0)
            assert len(retrieved) == K0


def test_without_labels_it_draws_at_random_and_always_the_same():
    memory = told("paper")
    assert sources(memory, [set(), set()]) == sources(memory, [set(), set()])
    named = [name for row in sources(memory, [set(), set()]) for layer in row for name in layer]
    assert len(set(named)) > 2


def test_rows_stay_in_order_of_birth():
    memory = told("paper")
    with reading_as(memory.engine.model, around=partial(OracleMechanism, wanted=[{"s3"}, {"s3"}])):
        mechanism, views = mechanism_for_reads(memory.engine), memory.snapshot()
        for layer in range(3):
            for found in mechanism.retrieve(layer, torch.zeros(2, 1, 32), torch.ones(2, 1, dtype=torch.bool), views):
                assert torch.equal(found.rows.birth, found.rows.birth.sort().values)


def test_labels_must_fit_the_batch():
    with pytest.raises(InputError, match="labels for every batch row, got 1 for 2"):
        sources(told("paper"), [{"s1"}])


def test_an_empty_memory_gives_nothing():
    memory = variant("paper").new_memory(batch_size=2)
    memory.write([ids(16), ids(16)], source="a")
    assert sources(memory, [{"a"}, {"a"}]) == [[[], [], []]] * 2
