"""What is refused: other decoders, other layers, and options that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mplus_longmem import LongMemMechanism
from mplus_longmem.bank import Heads
from mplus_longmem.mechanism import _heads
from torch import Tensor

import mplus
from mplus.errors import ConfigError, MemoryMismatchError, NotSupported
from mplus.mechanisms import MemoryMechanism

Wrap = Callable[..., Any]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def test_a_bank_of_another_layer_is_refused(wrap: Wrap, model: Any, tmp_path: Path) -> None:
    memory = model.new_memory()
    memory.write(ids(20), source="s")
    memory.save(tmp_path)
    other = wrap(layer=3)
    with pytest.raises(MemoryMismatchError, match="mechanism"):
        mplus.Memory.load(tmp_path, other)
    with pytest.raises(MemoryMismatchError, match="another model"):
        other(ids(1, 5), memory=memory)


def test_a_side_network_of_another_decoder_is_refused(wrap: Wrap, model: Any) -> None:
    other = wrap(seed=1)
    memory = other.new_memory()
    memory.write(ids(20), source="s")
    other.mplus.load_state_dict(model.mplus.state_dict())
    with pytest.raises(MemoryMismatchError, match="trained beside another decoder"):
        other(ids(1, 5), memory=memory)
    assert memory.stores[0].count(0) == 5, "the bank stays as it was"
    other.mplus_engine.mechanism.draw_parameters()
    with torch.no_grad():
        other(ids(1, 5), memory=memory)
    narrower = {name: one[..., :-1] for name, one in model.mplus.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.mplus.load_state_dict(narrower)


@pytest.mark.parametrize(
    ("options", "sizes", "said"),
    [
        ({"layer": 5}, {}, "layer must be below 5"),
        ({"reduction": 6}, {}, "reduction must be at most 5"),
        ({"chunk_size": 0}, {}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"bank_dtype": "int8"}, {}, "bank_dtype must be one of"),
        ({"layers": 3}, {}, "did you mean 'layer'"),
        ({}, {"retrieved_tokens": 0}, "retrieved_tokens must be at least 1 chunk"),
        ({}, {"long_term_tokens": 0}, "long_term_tokens must be at least 1 chunk"),
        ({}, {"short_term_tokens": 9}, "short_term_tokens means nothing to the mechanism 'longmem'"),
        ({}, {"retriever": "recent"}, "retriever means nothing to the mechanism 'longmem'"),
        ({}, {"memory_rows": "hidden"}, "memory_rows must be one of 'projected'"),
    ],
)
def test_options_that_cannot_be_are_named(wrap: Wrap, options: Any, sizes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wrap(sizes=sizes, **options)


def test_decoders_that_do_not_fit_are_refused(model: Any) -> None:
    from attrs import evolve

    engine = model.mplus_engine
    with pytest.raises(NotSupported, match="all of whose layers attend"):
        LongMemMechanism.build(evolve(engine.shape, hybrid=True), engine.config, engine.mechanism.options)
    with pytest.raises(NotSupported, match="how many heads it has"):
        _heads(evolve(engine.shape, head_size=None), 4)
    mechanism: MemoryMechanism = engine.mechanism
    assert mechanism.additions.search.heads == Heads(4, 2, 8, 8, 4)
    with pytest.raises(NotSupported, match="2 heads of 8 and 8, where a token has 30 numbers"):
        mechanism.layout(engine.shape, "projected", 30)


def test_a_bank_of_its_own_dtype_is_kept_verified_and_read(wrap: Wrap, tmp_path: Path) -> None:
    """Its mean keys are in another one."""
    from mplus.memory.format.verify import verify

    model = wrap(bank_dtype="float16")
    memory = model.new_memory()
    memory.write(ids(20), source="s")
    layout = memory.stores[0].layout
    assert (layout.dtype, layout.key_dtype) == (torch.float16, torch.float64)
    memory.save(tmp_path)
    assert verify(tmp_path) == []
    text, again = ids(1, 5), mplus.Memory.load(tmp_path, model)
    with torch.no_grad():
        assert torch.equal(model(text, memory=again).logits, model(text, memory=memory).logits)


def test_the_oldest_chunks_leave_as_room_is_needed(wrap: Wrap) -> None:
    """Twice as many as are written, in the published variant, and never more than there are (L5)."""
    held = {}
    for evict_double in (False, True):
        model = wrap(sizes={"long_term_tokens": 6}, evict_double=evict_double)
        memory = model.new_memory()
        held[evict_double] = []
        for number in range(4):
            memory.write(ids(12, seed=number), source=f"s{number}")
            held[evict_double].append(memory.stores[0].count(0))
    assert held == {False: [3, 6, 6, 6], True: [3, 3, 3, 3]}
